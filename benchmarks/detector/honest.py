"""Honest training runs: architectures at several stages, and what people do to trained models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from detector.data import Draw, drawn
from detector.nets import OWN, built
from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.tasks import Segmentation
from medpfl.federation.training import TrainingConfig, train
from medpfl.models import SEGMENTATION, build_model, prepare

STAGES = {"untrained": 0, "early": 4, "longer": 40}
"""Training steps before the round."""

SLOW = {
    "resnet18_cifar": 4,
    "cnn_fedavg": 2,
    "densenet121": 4,
    "efficientnet_b0": 4,
    "vit": 3,
    "resnet18": 2,
    "vgg_bn": 2,
}
"""Architectures that take so many times fewer steps."""

BATCHES = (8, 16, 32, 64)


@dataclass(frozen=True)
class Round:
    """What one client has in one round: the model that came, its images, and how it trains.

    earlier: the honest model of the round before, as it was agreed on; None where the model that came is honest.
    """

    model: GlobalModel
    batch: Batch
    recipe: Recipe
    earlier: GlobalModel | None = None


def honest_round(
    architecture: str, stage: str, variant: str, data: str, folder: Path | None, generator: torch.Generator
) -> Round:
    """One run with its own net, images and recipe, all drawn from `generator`."""
    size = BATCHES[int(torch.randint(len(BATCHES), (), generator=generator))]
    draw = drawn(data, folder, size, generator)
    masks = architecture in SEGMENTATION
    model = new_model(architecture, draw, generator)
    model = trained(model, draw.batch(draw.others, masks), STAGES[stage] // SLOW.get(architecture, 1), generator)
    model = VARIANT_MAKERS[variant](model, draw.batch(draw.auxiliary, masks), generator)
    return Round(model, draw.batch(draw.client, masks), drawn_recipe(size, generator))


def new_model(architecture: str, draw: Draw, generator: torch.Generator) -> GlobalModel:
    """An untrained net of the zoo or of `guards_nets`, for the run's images."""
    shape = tuple(draw.data.images.shape[1:])
    if architecture in OWN:
        task = draw.data.task
        module = built(architecture, shape[0], shape[1], task.classes, generator)
        return prepare(module, name=architecture, image_shape=shape, task=task)
    task = Segmentation(2) if architecture in SEGMENTATION else draw.data.task
    return build_model(architecture, image_shape=shape, task=task, generator=generator)


def drawn_recipe(size: int, generator: torch.Generator) -> Recipe:
    """SGD with one to four local steps."""
    steps = (1, 1, 2, 4)[int(torch.randint(4, (), generator=generator))]
    rate = (0.01, 0.05, 0.1)[int(torch.randint(3, (), generator=generator))]
    return Recipe(update="delta", batch_size=size // steps, local_steps=steps, learning_rate=rate)


def trained(model: GlobalModel, batch: Batch, steps: int, generator: torch.Generator) -> GlobalModel:
    """The model after so many Adam steps of 16 images."""
    if not steps:
        return model
    return train(model, batch.images, batch.targets, TrainingConfig(steps=steps, batch_size=16), generator)[0]


def pruned(model: GlobalModel, _batch: Batch, generator: torch.Generator) -> GlobalModel:
    """Half to nine tenths of every weight's entries at zero, the smallest ones."""
    share = 0.5 + 0.4 * float(torch.rand((), generator=generator))

    def kept(weight: Tensor) -> Tensor:
        limit = weight.abs().flatten().kthvalue(max(1, int(share * weight.numel()))).values
        return torch.where(weight.abs() > limit, weight, 0.0)

    return _weights_changed(model, kept)


def int8(model: GlobalModel, _batch: Batch, _generator: torch.Generator) -> GlobalModel:
    """Weights rounded to 255 levels per tensor, and back."""

    def rounded(weight: Tensor) -> Tensor:
        step = weight.abs().max().clamp_min(1e-12) / 127
        return (weight / step).round() * step

    return _weights_changed(model, rounded)


def fine_tuned(model: GlobalModel, batch: Batch, generator: torch.Generator) -> GlobalModel:
    """Trained on with other images and a new last layer that starts at zero."""
    new = {name: torch.zeros_like(model.parameters[name]) for name in list(model.parameters)[-2:]}
    model = replace(model, parameters={**model.parameters, **new})
    return trained(model, batch, 12, generator)


def lora(model: GlobalModel, batch: Batch, generator: torch.Generator) -> GlobalModel:
    """Low-rank factors trained beside frozen weights, then added to them."""
    base, factors = dict(model.parameters), {}
    for name, weight in base.items():
        if weight.ndim >= 2 and min(weight.flatten(1).shape) > RANK:
            rows, columns = weight.flatten(1).shape
            down = torch.randn(RANK, columns, generator=generator) / columns**0.5
            factors[name] = (torch.zeros(rows, RANK).requires_grad_(), down.requires_grad_())
    if not factors:
        return model

    def merged() -> dict[str, Tensor]:
        added = {name: base[name] + (up @ down).reshape(base[name].shape) for name, (up, down) in factors.items()}
        return {**base, **added}

    optimizer = torch.optim.Adam([factor for pair in factors.values() for factor in pair], lr=0.005)
    for _ in range(8):
        chosen = torch.randint(len(batch), (16,), generator=generator)
        output, _ = model.forward(batch.images[chosen], parameters=merged(), batch_norm="eval")
        optimizer.zero_grad()
        model.task.loss(output, batch.targets[chosen]).backward()
        optimizer.step()
    return replace(model, parameters={name: tensor.detach() for name, tensor in merged().items()})


RANK = 4


def frozen_body(model: GlobalModel, _batch: Batch, _generator: torch.Generator) -> GlobalModel:
    """All but the last layers with weight and bias frozen: clients train these alone."""
    names = list(model.parameters)
    last = set(names[-4:]) if len(names) > 4 else set(names[-2:])
    frozen = {name: tensor for name, tensor in model.parameters.items() if name not in last}
    kept = {name: tensor for name, tensor in model.parameters.items() if name in last}
    return replace(model, parameters=kept, constants={**model.constants, **frozen})


def plain(model: GlobalModel, _batch: Batch, _generator: torch.Generator) -> GlobalModel:
    """As it is."""
    return model


VARIANT_MAKERS: dict[str, Callable[[GlobalModel, Batch, torch.Generator], GlobalModel]] = {
    maker.__name__: maker for maker in (plain, pruned, int8, fine_tuned, lora, frozen_body)
}


def _weights_changed(model: GlobalModel, change: Callable[[Tensor], Tensor]) -> GlobalModel:
    changed = {name: change(tensor) if tensor.ndim >= 2 else tensor for name, tensor in model.parameters.items()}
    return replace(model, parameters=changed)

"""A variational bottleneck in front of a model's classifier, and what reaches the classifier."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from medpfl.core.domain import GlobalModel

NOISE = "noise"
"""Name, within the layer, of the draw from the standard normal distribution; zero is the mean."""


LAYER = "layer"
"""Name, behind the bottleneck, of the dense layer that it was put in front of."""


class Bottlenecked(nn.Module):
    """A dense layer behind z = mean + softplus(spread) * noise: k -> 2 K, K -> k, then the layer itself.

    The noise is a constant of the model, zero unless a client puts its own draw there.
    """

    def __init__(self, layer: nn.Linear, width: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(layer.in_features, 2 * width)
        self.decoder = nn.Linear(width, layer.in_features)
        self.layer = layer
        self.register_buffer(NOISE, torch.zeros(1, width), persistent=False)
        self.noise: Tensor

    def forward(self, features: Tensor) -> Tensor:
        """(N, k) -> (N, units)."""
        mean, deviation = moments(self.encoder(features))
        units: Tensor = self.layer(self.decoder(mean + deviation * self.noise))
        return units


def moments(encoded: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (N, K) each from what the encoder gives, (N, 2 K)."""
    mean, spread = encoded.chunk(2, dim=-1)
    return mean, functional.softplus(spread)


def classifier(model: GlobalModel) -> str | None:
    """Path of the last trainable dense layer with an output per class; None if there is none."""
    found = [
        path
        for path, layer in model.module.named_modules()
        if path
        and f"{path}.weight" in model.parameters
        and isinstance(layer, nn.Linear)
        and model.parameters[f"{path}.weight"].shape[0] == model.task.classes
    ]
    return found[-1] if found else None


def with_bottleneck(model: GlobalModel, path: str, width: int, generator: torch.Generator) -> GlobalModel:
    """The model with a bottleneck of that width in front of the dense layer at `path`.

    New weights are uniform within 1 / sqrt(inputs), as PyTorch's own; trainable tensors keep the order of the module.
    """
    module = copy.deepcopy(model.module)
    parent, _, name = path.rpartition(".")
    layer = module.get_submodule(path)
    assert isinstance(layer, nn.Linear)  # the caller asked `classifier`
    bottleneck = Bottlenecked(layer, width)
    setattr(module.get_submodule(parent), name, bottleneck)
    like = next(iter(model.parameters.values()))
    drawn: dict[str, Tensor] = {}
    for part, dense in (("encoder", bottleneck.encoder), ("decoder", bottleneck.decoder)):
        for kind, tensor in dense.named_parameters():
            values = 2.0 * torch.rand(tensor.shape, dtype=torch.float64, generator=generator) - 1.0
            drawn[f"{path}.{part}.{kind}"] = (dense.in_features**-0.5 * values).to(like)
    renamed = {
        f"{path}.{LAYER}.{name.rpartition('.')[2]}" if name.rpartition(".")[0] == path else name: tensor
        for name, tensor in model.parameters.items()
    }
    available = {**renamed, **drawn}
    parameters = {name: available[name] for name, _ in module.named_parameters() if name in available}
    noise = torch.zeros(1, width, dtype=like.dtype, device=like.device)
    return replace(model, module=module, parameters=parameters, constants={**model.constants, f"{path}.{NOISE}": noise})


def bottleneck_of(model: GlobalModel) -> str | None:
    """Path of the bottleneck in front of the classifier; None where there is none."""
    path = classifier(model)
    outer = "" if path is None else path.removesuffix(f".{LAYER}")
    return outer if outer != path and f"{outer}.{NOISE}" in model.constants else None


@contextmanager
def what_reaches(model: GlobalModel, path: str) -> Iterator[list[Tensor]]:
    """Inside, the inputs of the layer at `path` are collected, one per forward pass."""
    seen: list[Tensor] = []
    handle = model.module.get_submodule(path).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()

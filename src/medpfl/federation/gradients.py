"""The gradient of one local step: micro-batches, autocast, loss scaling, per-example gradients, hooks, clipping."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from medpfl.core.domain import Batch, GlobalModel, Recipe, Tensors
from medpfl.federation.hooks import Hooks, Step

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class StepGradient:
    """What one local step computes: gradients by name, the mean loss, and the model with its new buffers."""

    gradients: Tensors
    loss: Tensor
    model: GlobalModel


def step_gradient(
    model: GlobalModel,
    batch: Batch,
    recipe: Recipe,
    *,
    hooks: Hooks,
    generator: torch.Generator,
    loss_scale: Tensor | None = None,
) -> StepGradient:
    """The gradient of the mean loss on `batch` at the model's parameters, before clipping.

    With `recipe.accumulation` it is the mean of the micro-batches' mean gradients, as a client that accumulates has
    it. With hooks that clip per example it is what they make of the per-example gradients of the whole batch. With a
    `loss_scale` the loss is multiplied by it before differentiation and the gradient divided by it afterwards (before
    any hook sees it); what overflows in between is not finite. An empty batch has gradient and loss 0. Differentiable
    in the images.
    """
    if hooks.clips_per_example:
        result = _per_example_gradients(model, batch, recipe, loss_scale)
    elif len(batch) == 0:
        zeros = {name: torch.zeros_like(parameter) for name, parameter in model.parameters.items()}
        return StepGradient(zeros, torch.zeros((), device=model.device), model)
    else:
        result = _accumulated_gradient(model, batch, recipe, loss_scale)
    gradients = result.gradients
    if loss_scale is not None:
        gradients = {name: gradient / loss_scale for name, gradient in gradients.items()}
    if hooks.clips_per_example:
        gradients = hooks.per_example(gradients, recipe, generator)
    return replace(result, gradients=gradients)


def finished_gradient(step: Step, hooks: Hooks, generator: torch.Generator) -> Tensors:
    """What the optimizer takes, or an update of kind `gradient` holds: after the hook, then the recipe's clipping."""
    gradients = hooks.gradient(step, generator)
    bound = step.recipe.gradient_clip
    return gradients if bound is None else clip_gradients(gradients, bound)


def clip_gradients(gradients: Tensors, bound: float) -> dict[str, Tensor]:
    """Scales all gradients down so that their joint norm is at most `bound`, as `torch.nn.utils.clip_grad_norm_`.

    >>> clip_gradients({"weight": torch.tensor([3.0, 4.0])}, 1.0)["weight"].norm().item() <= 1.0
    True
    """
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))
    factor = torch.clamp(bound / (norm + 1e-6), max=1.0)
    return {name: gradient * factor for name, gradient in gradients.items()}


def _accumulated_gradient(model: GlobalModel, batch: Batch, recipe: Recipe, loss_scale: Tensor | None) -> StepGradient:
    parts = min(recipe.accumulation, len(batch))
    factor: Tensor | float = 1.0 / parts if loss_scale is None else loss_scale / parts
    gradients: dict[str, Tensor] = {}
    losses: list[Tensor] = []
    for part in _micro_batches(batch, parts):

        def scaled_loss(parameters: Tensors, model: GlobalModel = model, part: Batch = part) -> Any:
            loss, buffers = _loss(model, parameters, part, recipe)
            return loss * factor, (loss, buffers)

        summand, (loss, buffers) = torch.func.grad(scaled_loss, has_aux=True)(dict(model.parameters))
        gradients = {name: gradients[name] + summand[name] for name in summand} if gradients else summand
        losses.append(loss)
        model = _advance(model, buffers, recipe)
    return StepGradient(gradients, torch.stack(losses).mean(), model)


def _per_example_gradients(model: GlobalModel, batch: Batch, recipe: Recipe, loss_scale: Tensor | None) -> StepGradient:
    """Gradients (N, *shape) of each image's own loss."""
    if len(batch) == 0:
        empty = {name: tensor.new_zeros((0, *tensor.shape)) for name, tensor in model.parameters.items()}
        return StepGradient(empty, torch.zeros((), device=model.device), model)

    def scaled_loss(parameters: Tensors, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss, _ = _loss(model, parameters, Batch(image[None], target[None]), recipe)
        return (loss if loss_scale is None else loss * loss_scale), loss

    per_example = torch.func.vmap(torch.func.grad(scaled_loss, has_aux=True), in_dims=(None, 0, 0))
    gradients, losses = per_example(dict(model.parameters), batch.images, batch.targets)
    return StepGradient(gradients, losses.mean(), model)


def _loss(model: GlobalModel, parameters: Tensors, batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
    with _autocast(recipe, batch.images.device.type):
        output, buffers = model.forward(batch.images, parameters=parameters, batch_norm=recipe.batch_norm)
        return model.task.loss(output, batch.targets), buffers


def _autocast(recipe: Recipe, device: str) -> AbstractContextManager[Any]:
    if recipe.precision not in AUTOCAST:
        return nullcontext()
    return torch.autocast(device, dtype=AUTOCAST[recipe.precision], cache_enabled=False)


def _micro_batches(batch: Batch, parts: int) -> Iterator[Batch]:
    for images, targets in zip(batch.images.tensor_split(parts), batch.targets.tensor_split(parts), strict=True):
        yield Batch(images, targets)


def _advance(model: GlobalModel, buffers: Tensors, recipe: Recipe) -> GlobalModel:
    """The model after one forward pass: new buffers, and batch norm counters one further in train mode."""
    if recipe.batch_norm == "eval":
        return model
    counters = dict(model.counters)
    for path, layer in model.module.named_modules():
        name = f"{path}.num_batches_tracked" if path else "num_batches_tracked"
        if getattr(layer, "functional_batch_norm", False) and name in counters:
            counters[name] = counters[name] + 1
    return replace(model, buffers=buffers, counters=counters)

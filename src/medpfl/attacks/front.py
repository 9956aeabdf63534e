"""Puts layers of the server's making in front of any model, as a malicious server sends them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from medpfl.attacks.crafted import why_no_room
from medpfl.core.domain import GlobalModel, Tensors

FRONT, BODY = "front", "body"
"""Prefixes of the names of the server's own tensors and of the model's."""

WEIGHT, BIAS = f"{FRONT}.first.weight", f"{FRONT}.first.bias"
"""Names of the tensors of a dense front whose change is read out: (K, D) and (K,)."""

SECOND_WEIGHT, SECOND_BIAS = f"{FRONT}.second.weight", f"{FRONT}.second.bias"
"""Names of the tensors that lead back to the image's shape: (D, K) and (D,)."""


def dense_in_front(
    model: GlobalModel,
    tensors: Tensors,
    *,
    activation: Callable[[Tensor], Tensor] = torch.relu,
    residual: bool = False,
) -> GlobalModel:
    """`model` behind two dense layers with an activation between them, whose output has the image's shape.

    tensors: the four of the names above. residual: the image itself is added, so that the model still sees it.
    """
    units, inputs = tensors[WEIGHT].shape
    return in_front(model, _Dense(inputs, units, activation, residual), tensors)


def dense_front_parameters(model: GlobalModel, units: int) -> int:
    """Trainable entries of two dense layers with so many units in front of `model`."""
    inputs = torch.Size(model.image_shape).numel()
    return 2 * units * inputs + units + inputs


def why_no_memory(model: GlobalModel, units: int) -> str | None:
    """The reason why so many units in front of `model` cannot be sent, trained and read on this machine."""
    what = f"a module of {units} units for images {tuple(model.image_shape)}"
    return why_no_room(what, dense_front_parameters(model, units))


def why_no_front(model: GlobalModel) -> str | None:
    """The reason why layers in front of `model` get no gradient; None if they do.

    A model that rounds its input, or looks it up in a table, cannot be trained through it.
    """
    images = torch.rand((2, *model.image_shape), generator=torch.Generator().manual_seed(0), device="cpu")
    images = images.to(model.device).requires_grad_()
    output, _ = model.forward(images)
    gradient = (
        torch.autograd.grad(output.square().sum(), images, allow_unused=True)[0] if output.requires_grad else None
    )
    if gradient is not None and bool(gradient.any()):
        return None
    return (
        f"the outputs of '{model.name}' have no derivative by its input (it rounds it, or looks it up in a table), so "
        "layers in front of it get no gradient: attack it with its own layers"
    )


def in_front(model: GlobalModel, front: nn.Module, tensors: Tensors) -> GlobalModel:
    """`model` fed with what `front` makes of the images, which must have the images' shape.

    tensors: all trainable tensors of `front`, their names with the prefix `front.`; the model's own get `body.`. The
    module's own tensors are never used, so they may be on the `meta` device and take no memory.
    """

    def named(values: Tensors) -> dict[str, Tensor]:
        return {f"{BODY}.{name}": tensor for name, tensor in values.items()}

    return replace(
        model,
        module=_InFront(front, model.module).eval(),
        parameters={**tensors, **named(model.parameters)},
        buffers=named(model.buffers),
        counters=named(model.counters),
        constants=named(model.constants),
    )


def behind(model: GlobalModel) -> GlobalModel:
    """The model behind the layers in front, with the names of its own tensors: `in_front` undone."""
    assert isinstance(model.module, _InFront)  # made by `in_front`
    return replace(
        model,
        module=model.module.body,
        parameters=_within(model.parameters, BODY),
        buffers=_within(model.buffers, BODY),
        counters=_within(model.counters, BODY),
        constants=_within(model.constants, BODY),
    )


def _within(tensors: Tensors, part: str) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class _Dense(nn.Module):
    def __init__(self, inputs: int, units: int, activation: Callable[[Tensor], Tensor], residual: bool) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, units, device="meta")
        self.second = nn.Linear(units, inputs, device="meta")
        self.activation = activation
        self.residual = residual

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.second(self.activation(self.first(images.flatten(1)))).reshape(images.shape)
        return output + images if self.residual else output


class _InFront(nn.Module):
    def __init__(self, front: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.front = front
        self.body = body

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.body(self.front(images))
        return output

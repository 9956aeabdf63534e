"""Two dense layers in front of any model, made so that their gradient holds single images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from medpfl.core.domain import GlobalModel

FRONT, BODY = "front", "body"
WEIGHT, BIAS = f"{FRONT}.first.weight", f"{FRONT}.first.bias"
"""Names of the tensors whose change is read out: (K, D) and (K,)."""

MOST_BRIGHT = 1.0
"""No image in [0, 1] is brighter on average."""


@dataclass(frozen=True)
class LeakageModule:
    """What the two layers compute: offset + gain * direction * mean over k of relu(brightness - edge_k).

    The first layer's rows are scale / D and its biases -scale * edge_k, so that unit k is active for images whose mean
    value is above edge_k; the second layer's columns are all equal, gain * direction / (scale * K), so that every
    active unit gets the same error. The output does not depend on `scale`, but the first layer's gradient grows by
    1 / scale while its weights shrink by it.

    edges: (K,) float64, rising. direction: (D,) of length 1. offset: (D,). scale and gain: above 0.
    """

    edges: Tensor
    direction: Tensor
    offset: Tensor
    scale: float
    gain: float

    def in_front_of(self, model: GlobalModel) -> GlobalModel:
        """`model` with the module in front of it; the names of the model's own tensors get the prefix `body.`."""
        return _in_front(model, self._tensors(-self.scale * self.edges))

    def dead_in_front_of(self, model: GlobalModel) -> GlobalModel:
        """The same with all units off for every image: its first layer gets no gradient, whatever the images are."""
        return _in_front(model, self._tensors(torch.full_like(self.edges, -2 * self.scale * MOST_BRIGHT)))

    def _tensors(self, bias: Tensor) -> dict[str, Tensor]:
        units, inputs = len(self.edges), len(self.direction)
        column = self.gain * self.direction / (self.scale * units)
        tensors = {
            WEIGHT: torch.full((units, inputs), self.scale / inputs),
            BIAS: bias.float(),
            f"{FRONT}.second.weight": column.float()[:, None].repeat(1, units),
            f"{FRONT}.second.bias": self.offset.float(),
        }
        return {name: tensor.to(self.direction.device) for name, tensor in tensors.items()}


def module_parameters(model: GlobalModel, units: int) -> int:
    """Trainable entries of a module with so many units in front of `model`."""
    inputs = torch.Size(model.image_shape).numel()
    return 2 * units * inputs + units + inputs


class _Front(nn.Module):
    """Image -> brightness bins -> image-shaped output. Its own tensors are never used, so they take no memory."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, units, device="meta")
        self.second = nn.Linear(units, inputs, device="meta")

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.second(torch.relu(self.first(images.flatten(1))))
        return output.reshape(images.shape)


class _InFront(nn.Module):
    def __init__(self, front: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.front = front
        self.body = body

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.body(self.front(images))
        return output


def _in_front(model: GlobalModel, tensors: dict[str, Tensor]) -> GlobalModel:
    units, inputs = tensors[WEIGHT].shape

    def named(values: object) -> dict[str, Tensor]:
        return {f"{BODY}.{name}": tensor for name, tensor in dict(values).items()}  # type: ignore[call-overload]

    return replace(
        model,
        module=_InFront(_Front(inputs, units), model.module).eval(),
        parameters={**tensors, **named(model.parameters)},
        buffers=named(model.buffers),
        counters=named(model.counters),
        constants=named(model.constants),
    )

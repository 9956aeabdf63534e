"""Two dense layers in front of any model, made so that their gradient holds single images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.attacks.front import BIAS, SECOND_BIAS, SECOND_WEIGHT, WEIGHT, dense_in_front
from medpfl.attacks.number_grid import rows_and_biases
from medpfl.core.domain import GlobalModel

MOST_BRIGHT = 1.0
"""No image in [0, 1] is brighter on average."""


@dataclass(frozen=True)
class LeakageModule:
    """What the two layers compute: offset + gain * direction * mean over k of relu(brightness - edge_k).

    The first layer's rows are scale / D and its biases -scale * edge_k, so that unit k is active for images whose mean
    value is above edge_k; the second layer's columns are all equal, gain * direction / (scale * K), so that every
    active unit gets the same error. The output does not depend on `scale`, but the first layer's gradient grows by
    1 / scale while its weights shrink by it.

    edges: (K,) float64, rising. direction: (D,) of length 1. offset: (D,). scale and gain: above 0. half: the type in
    which clients compute, if it is a half precision; rows and biases are then numbers of that type (`number_grid`).
    """

    edges: Tensor
    direction: Tensor
    offset: Tensor
    scale: float
    gain: float
    half: torch.dtype | None = None

    def in_front_of(self, model: GlobalModel) -> GlobalModel:
        """`model` with the module in front of it; the names of the model's own tensors get the prefix `body.`."""
        rows, biases = torch.full_like(self.edges, self.scale / len(self.direction)), -self.scale * self.edges
        if self.half is not None:
            rows, biases = rows_and_biases(self.edges, len(self.direction), self.scale, self.half)
        return dense_in_front(model, self._tensors(rows, biases))

    def dead_in_front_of(self, model: GlobalModel) -> GlobalModel:
        """The same with all units off for every image: its first layer gets no gradient, whatever the images are."""
        rows = torch.full_like(self.edges, self.scale / len(self.direction))
        return dense_in_front(model, self._tensors(rows, torch.full_like(rows, -2 * self.scale * MOST_BRIGHT)))

    def _tensors(self, rows: Tensor, biases: Tensor) -> dict[str, Tensor]:
        units, inputs = len(self.edges), len(self.direction)
        column = self.gain * self.direction / (self.scale * units)
        tensors = {
            WEIGHT: rows.float()[:, None].repeat(1, inputs),
            BIAS: biases.float(),
            SECOND_WEIGHT: column.float()[:, None].repeat(1, units),
            SECOND_BIAS: self.offset.float(),
        }
        return {name: tensor.to(self.direction.device) for name, tensor in tensors.items()}

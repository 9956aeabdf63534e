"""Layers whose weight gradients ghost matching knows: dense layers and the affine part of normalizations.

All tensors are candidate-major batches: A candidates of K images each make A * K rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from medpfl.attacks.matching.ghost.gradients import Explicit, Gradient, Pulled, gram

MEMORY_FACTOR = 250.0
"""Multiply-adds that take as long as one more number per weight written and read."""

UNFOLD_FACTOR = 200.0
"""The same for one number of the unfolded inputs."""


class Layer(Protocol):
    """What matching knows of one layer."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its trainable tensors that are matched."""

    def gradients(
        self, a: Tensor, d: Tensor, targets: Mapping[str, Tensor], count: int, residual: bool
    ) -> list[Gradient]:
        """The gradients of its tensors, in the order of `names`, of `count` candidates.

        targets: (A or 1, *shape) by name. residual: see `Explicit`.
        """


def gram_is_cheaper(inputs: int, outputs: int, positions: int) -> bool:
    """Whether a weight (outputs, inputs) applied at so many positions per candidate is better never formed.

    Forming it costs a product and memory traffic per weight, not forming it two Gram matrices and their products.

    >>> gram_is_cheaper(4608, 512, 16), gram_is_cheaper(576, 64, 1024)
    (True, False)
    """
    formed = float(inputs * outputs) * (positions + MEMORY_FACTOR)
    unformed = 2.0 * positions**2 * (inputs + outputs) + UNFOLD_FACTOR * inputs * positions
    return unformed < formed


@dataclass(frozen=True)
class Linear:
    """A dense layer on the last axis; axes between the first and the last are positions."""

    weight: str | None
    bias: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Weight, bias."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def gradients(
        self, a: Tensor, d: Tensor, targets: Mapping[str, Tensor], count: int, residual: bool
    ) -> list[Gradient]:
        """See `Layer`."""
        inputs, outputs = a.reshape(count, -1, a.shape[-1]), d.reshape(count, -1, d.shape[-1])
        result: list[Gradient] = []
        if self.weight is not None:
            target = targets[self.weight]
            if not residual and gram_is_cheaper(inputs.shape[2], outputs.shape[2], inputs.shape[1]):
                result.append(
                    gram(
                        inputs, outputs, target, lambda back: back.reshape(a.shape), lambda rows: rows.reshape(d.shape)
                    )
                )
            else:

                def pull(direction: Tensor) -> Pulled:
                    into_d = torch.bmm(inputs, direction.transpose(1, 2)).reshape(d.shape)
                    return into_d, torch.bmm(outputs, direction).reshape(a.shape)

                result.append(Explicit(torch.bmm(outputs.transpose(1, 2), inputs), target, pull, residual))
        if self.bias is not None:

            def shift(direction: Tensor) -> Pulled:
                return direction[:, None].expand(outputs.shape).reshape(d.shape), None

            result.append(Explicit(outputs.sum(dim=1), targets[self.bias], shift, residual))
        return result


@dataclass(frozen=True)
class Affine:
    """Elementwise scale and shift behind a normalization: output = a * weight + bias.

    shape: that of both tensors. channel: they lie along axis 1, otherwise along the last axes.
    """

    weight: str | None
    bias: str | None
    shape: tuple[int, ...]
    channel: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Weight, bias."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def gradients(
        self, a: Tensor, d: Tensor, targets: Mapping[str, Tensor], count: int, residual: bool
    ) -> list[Gradient]:
        """See `Layer`."""
        result: list[Gradient] = []
        if self.weight is not None:

            def pull(direction: Tensor) -> Pulled:
                scale = self.spread(direction, d)
                return a * scale, d * scale

            result.append(Explicit(self.summed(a * d, count), targets[self.weight], pull, residual))
        if self.bias is not None:
            result.append(self.shift(d, targets[self.bias], count, residual))
        return result

    def shift(self, d: Tensor, target: Tensor, count: int, residual: bool) -> Explicit:
        """The gradient of a bias along the same axes."""

        def pull(direction: Tensor) -> Pulled:
            return self.spread(direction, d).expand_as(d), None

        return Explicit(self.summed(d, count), target, pull, residual)

    def summed(self, values: Tensor, count: int) -> Tensor:
        """Rows (A * K, ...) summed over images and positions: (A, *shape)."""
        if self.channel:
            values = values.flatten(2).sum(dim=2) if values.dim() > 2 else values
        return values.reshape(count, -1, *self.shape).sum(dim=1)

    def spread(self, tensors: Tensor, rows: Tensor) -> Tensor:
        """One tensor per candidate (A, *shape), shaped so that it broadcasts against rows (A * K, ...)."""
        spread = tensors if len(tensors) == len(rows) else tensors.repeat_interleave(len(rows) // len(tensors), dim=0)
        ones = (1,) * (rows.dim() - 1 - len(self.shape))
        return (
            spread.reshape(len(rows), *self.shape, *ones)
            if self.channel
            else spread.reshape(len(rows), *ones, *self.shape)
        )

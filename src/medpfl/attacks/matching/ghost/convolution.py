"""Convolutions in ghost matching: grouped convolutions, or matrix products of unfolded inputs, formed or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from medpfl.attacks.matching.ghost.gradients import Explicit, Gradient, Pulled, gram
from medpfl.attacks.matching.ghost.layers import Affine, gram_is_cheaper

SMALL_PRODUCT = 3_000_000
"""Convolutions with at most so many multiply-adds per candidate are matrix products of unfolded inputs: the library's
grouped convolution has its cost per group."""


@dataclass(frozen=True)
class Sliding:
    """How a convolution slides, in any number of dimensions, as `torch.ops.aten.convolution` takes it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def apply(self, a: Tensor, weight: Tensor) -> Tensor:
        """The convolution without bias."""
        shared = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)
        result: Tensor = torch.ops.aten.convolution(a, weight, None, *shared)
        return result

    def backward(self, d: Tensor, a: Tensor, weight: Tensor, *, of_input: bool) -> Tensor:
        """The derivative in the input, or in the weight."""
        shared = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)
        both = torch.ops.aten.convolution_backward(d, a, weight, None, *shared, [of_input, not of_input, False])
        result: Tensor = both[0] if of_input else both[1]
        return result

    def unfold(self, a: Tensor, kernel: tuple[int, ...], positions: tuple[int, ...]) -> Tensor:
        """Unfolded inputs (N, inputs * kernel, positions), copied from a strided view."""
        margins = [margin for size in reversed(self.padding) for margin in (size, size)]
        padded = F.pad(a, margins).contiguous() if any(margins) else a.contiguous()
        steps = padded.stride()[2:]
        view = padded.as_strided(
            (*a.shape[:2], *kernel, *positions),
            (
                *padded.stride()[:2],
                *(step * gap for step, gap in zip(steps, self.dilation, strict=True)),
                *(step * stride for step, stride in zip(steps, self.stride, strict=True)),
            ),
        )
        return view.reshape(len(a), a.shape[1] * prod(kernel), prod(positions))


@dataclass(frozen=True)
class Convolution:
    """A convolution, with bias or without; weight, bias: names where they are matched. tensor: the weight."""

    weight: str | None
    bias: str | None
    tensor: Tensor
    sliding: Sliding

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
            result.append(self._weight(a, d, targets[self.weight], count, residual))
        if self.bias is not None:
            affine = Affine(None, self.bias, (d.shape[1],), channel=True)
            result.append(affine.shift(d, targets[self.bias], count, residual))
        return result

    def _weight(self, a: Tensor, d: Tensor, target: Tensor, count: int, residual: bool) -> Gradient:
        positions, outputs = prod(d.shape[2:]) * (len(a) // count), len(self.tensor)
        inputs = self.tensor.numel() // outputs
        unfolds = not self.sliding.transposed and self.sliding.groups == 1 and a.dim() == 4
        if unfolds and not residual and gram_is_cheaper(inputs, outputs, positions):
            columns = self._columns(a, d, count).transpose(1, 2).contiguous()
            return gram(
                columns,
                _rows(d, count).transpose(1, 2).contiguous(),
                target.reshape(-1, outputs, inputs),
                lambda back: self._fold(back.transpose(1, 2), a),
                lambda rows: _unrowed(rows.transpose(1, 2), d),
            )
        if unfolds and (inputs * outputs * positions <= SMALL_PRODUCT or a.dtype == torch.float64):
            return self._product(a, d, target, count, residual)
        return self._grouped(a, d, target, count, residual)

    def _product(self, a: Tensor, d: Tensor, target: Tensor, count: int, residual: bool) -> Explicit:
        columns, rows = self._columns(a, d, count), _rows(d, count)

        def pull(direction: Tensor) -> Pulled:
            matrix = direction.reshape(count, len(self.tensor), -1)
            into_d = _unrowed(torch.bmm(matrix, columns), d)
            return into_d, self._fold(torch.bmm(matrix.transpose(1, 2), rows), a)

        gradient = torch.bmm(rows, columns.transpose(1, 2)).reshape(count, *self.tensor.shape)
        return Explicit(gradient, target, pull, residual)

    def _grouped(self, a: Tensor, d: Tensor, target: Tensor, count: int, residual: bool) -> Explicit:
        """All candidates as groups of one convolution, each with a weight of its own."""
        sliding = replace(self.sliding, groups=self.sliding.groups * count)
        inputs, outputs = _as_groups(a, count), _as_groups(d, count)
        shape = (count * len(self.tensor), *self.tensor.shape[1:])

        def pull(direction: Tensor) -> Pulled:
            weight = direction.reshape(shape)
            into_d = _from_groups(sliding.apply(inputs, weight), count)
            return into_d, _from_groups(sliding.backward(outputs, inputs, weight, of_input=True), count)

        gradient = sliding.backward(outputs, inputs, a.new_empty(shape), of_input=False)
        return Explicit(gradient.reshape(count, *self.tensor.shape), target, pull, residual)

    def _columns(self, a: Tensor, d: Tensor, count: int) -> Tensor:
        """Unfolded inputs (A, inputs * kernel, K * positions)."""
        columns = self.sliding.unfold(a, tuple(self.tensor.shape[2:]), tuple(d.shape[2:]))
        return _rows(columns, count)

    def _fold(self, columns: Tensor, a: Tensor) -> Tensor:
        """The derivative in the input of one in the unfolded inputs (A, inputs * kernel, K * positions)."""
        sliding, kernel = self.sliding, self.tensor.shape[2:]
        images = columns.reshape(*columns.shape[:2], len(a) // len(columns), -1).transpose(1, 2)
        images = images.reshape(len(a), columns.shape[1], -1)
        return F.fold(images, a.shape[2:], kernel, sliding.dilation, sliding.padding, sliding.stride)


def _rows(values: Tensor, count: int) -> Tensor:
    """(A * K, channels, *spatial) as (A, channels, K * positions)."""
    return values.reshape(count, -1, *values.shape[1:]).flatten(3).transpose(1, 2).flatten(2)


def _unrowed(rows: Tensor, d: Tensor) -> Tensor:
    """(A, channels, K * positions) in the shape of d (A * K, channels, *spatial)."""
    count, channels = rows.shape[:2]
    return rows.reshape(count, channels, len(d) // count, -1).transpose(1, 2).reshape(d.shape)


def _as_groups(values: Tensor, count: int) -> Tensor:
    """(A * K, C, *spatial) as (K, A * C, *spatial)."""
    return values.reshape(count, -1, *values.shape[1:]).transpose(0, 1).flatten(1, 2)


def _from_groups(values: Tensor, count: int) -> Tensor:
    """(K, A * C, *spatial) as (A * K, C, *spatial)."""
    return values.reshape(len(values), count, -1, *values.shape[2:]).transpose(0, 1).flatten(0, 1)

"""How alike a read-out and a sample are, whatever the read-out's scale and offset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.core.functional import MSE_FLOOR
from medpfl.guards.layer_views import LayerView


@dataclass(frozen=True)
class Samples:
    """Samples without offsets, and without what is common to all, each at length 1; and their lengths without offset."""

    free: Tensor
    own: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Space:
    """What samples and read-outs are compared in: pixels where the layer sees them, what it sees otherwise.

    offsets (q, D): directions that scale and brightness leave open; common (q + 1, D) those and the mean sample, if
    there are enough samples for a mean; both orthonormal rows.
    """

    shift: Tensor | None
    factor: Tensor | None
    offsets: Tensor
    common: Tensor

    def prepared(self, samples: Tensor) -> Samples:
        """Samples (S, D) as the layer gets them, ready to be compared with."""
        pixels = samples if self.factor is None or self.shift is None else (samples - self.shift) / self.factor
        free, own = _without(pixels, self.offsets), _without(pixels, self.common)
        return Samples(_unit(free), _unit(own), free.norm(dim=1))

    def compared(self, read: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
        """Correlations (rows, samples) without what is common, and PSNR in dB after the best scale and offset."""
        pixels = read if self.factor is None else read / self.factor
        pixels = _unit(pixels)
        match = (_unit(_without(pixels, self.common)) @ samples.own.T).abs().double()
        if self.factor is None:
            return match, torch.full_like(match, torch.nan)
        fit = (_unit(_without(pixels, self.offsets)) @ samples.free.T).double()
        error = samples.lengths.double().square() / read.shape[1] * (1.0 - fit.square()).clamp_min(0.0)
        return match, -10.0 * torch.log10(error.clamp_min(MSE_FLOOR))


MEAN_FROM = 3
"""Samples from which on their mean is something that they have in common, rather than one of them."""


def space_of(view: LayerView, pixels: tuple[Tensor, Tensor] | None) -> Space:
    """Of a layer. pixels: its samples as shift + factor * pixels, (D,) each, where it sees the image itself."""
    kind = view.errors
    shift, factor = (None, None) if pixels is None else (one.to(kind) for one in pixels)
    ones = kind.new_ones(view.inputs)
    offsets = _orthonormal([ones] if shift is None or factor is None else [ones, shift / factor])
    mean = view.mean() if shift is None or factor is None else (view.mean() - shift) / factor
    common = _orthonormal([*offsets, mean]) if view.count >= MEAN_FROM else offsets
    return Space(shift, factor, offsets, common)


def image_space(images: Tensor) -> Space:
    """Of whole images (N, D), pixel by pixel."""
    ones = torch.ones_like(images[0])
    offsets = _orthonormal([ones])
    common = _orthonormal([ones, images.mean(dim=0)]) if len(images) >= MEAN_FROM else offsets
    return Space(torch.zeros_like(ones), ones, offsets, common)


def _orthonormal(vectors: Sequence[Tensor]) -> Tensor:
    """Orthonormal rows that span the vectors (D,), in their order; what the earlier ones span adds none."""
    found: list[Tensor] = []
    for vector in vectors:
        left = vector.double()
        for _ in range(2):  # twice is enough against rounding
            for other in found:
                left = left - (left @ other) * other
        if left.norm() > 1e-6 * vector.double().norm():
            found.append(left / left.norm())
    return torch.stack(found).to(vectors[0].dtype)


def _without(rows: Tensor, basis: Tensor) -> Tensor:
    return rows - (rows @ basis.T) @ basis


def _unit(rows: Tensor) -> Tensor:
    """Rows at length 1; what is no more than rounding beside its row stays 0."""
    lengths = rows.norm(dim=1, keepdim=True)
    return torch.where(lengths > 0, rows / lengths.clamp_min(1e-30), 0.0)

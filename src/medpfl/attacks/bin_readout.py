"""Reads the images in brightness bins out of the gradient of a leakage module's first layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 0.03
"""How far a candidate may leave [0, 1] (root mean square) or its bin (mean value): 30 dB, what counts as recovered."""


@dataclass(frozen=True)
class Candidates:
    """Images (M, *image_shape), not clamped, best first, with the bin that each was read from (M,).

    deviations (M,): how far each leaves what an image of its bin can be. `bins_read`: bins with a bias gradient above the floor.
    """

    images: Tensor
    bins: Tensor
    deviations: Tensor
    bins_read: int


def read_bins(
    weight: Tensor, bias: Tensor, edges: Tensor, image_shape: tuple[int, ...], most: int, floor: float = 0.0
) -> Candidates:
    """At most `most` images out of the gradients (K, D) of the weights and (K,) of the biases, in float64.

    Units k and k + 1 differ by the images of bin k only, so their differences have the ratio dW / db of what is in it:
    the image itself if it is alone, a mixture otherwise; the last unit stands for itself. What rounding leaves in
    empty bins is told apart without any truth: an image lies in [0, 1] and its mean value in its bin, and its bias
    gradient is above `floor`. Of what passes, the candidates with the largest bias gradients come first.
    """
    weight_steps, bias_steps = between_neighbors(weight.double()), between_neighbors(bias.double())
    read = (bias_steps.abs() > floor).nonzero().flatten()
    found = weight_steps[read] / bias_steps[read, None]
    deviations = _deviations(found, edges.to(found.device), read)
    plausible = (deviations <= TOLERANCE).nonzero().flatten()
    order = plausible[bias_steps[read[plausible]].abs().argsort(descending=True, stable=True)][:most]
    return Candidates(
        images=found[order].reshape(-1, *image_shape),
        bins=read[order],
        deviations=deviations[order],
        bins_read=len(read),
    )


def between_neighbors(values: Tensor) -> Tensor:
    """Each row less the next one; the last as it is.

    >>> between_neighbors(torch.tensor([5.0, 3.0, 2.0])).tolist()
    [2.0, 1.0, 2.0]
    """
    return torch.cat([values[:-1] - values[1:], values[-1:]])


def _deviations(found: Tensor, edges: Tensor, bins: Tensor) -> Tensor:
    """The larger of how far candidates leave [0, 1] and their mean values leave their bins; NaN counts as infinite."""
    outside = (found - found.clamp(0, 1)).square().mean(dim=1).sqrt()
    above = torch.cat([edges[1:], edges.new_tensor([torch.inf])])
    means = found.mean(dim=1)
    missed = torch.maximum(edges[bins] - means, means - above[bins]).clamp_min(0)
    return torch.maximum(outside, missed).nan_to_num(nan=torch.inf)

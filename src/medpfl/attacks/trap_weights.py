"""Trap weights: rows that few images activate, so that a dense layer's units hold single ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from medpfl.attacks.layers import DenseLayer, layer_input
from medpfl.core.domain import GlobalModel

Signs = Literal["independent", "mirrored"]

HALVINGS = 40
"""Steps of the search for the positive weights' factor."""

WIDEST = 1e3
"""Largest factor that is looked at."""

MOST_IMAGES = 1024
"""Images that the factor is fitted to."""


@dataclass(frozen=True)
class Traps:
    """Weights negative + factor * positive (K, D) and biases (K,), all times a scale that a client is sent."""

    negative: Tensor
    positive: Tensor
    factor: float
    bias: Tensor

    def tensors(self, scale: float) -> tuple[Tensor, Tensor]:
        """Weights and biases in float32 whose deviation is `scale`."""
        return scale * self.weights.float(), (scale * self.bias).float()

    @property
    def weights(self) -> Tensor:
        """(K, D) float64 of deviation 1."""
        return self.negative + self.factor * self.positive

    def active(self, inputs: Tensor) -> Tensor:
        """Which units (N, K) the layer's inputs (N, D) activate."""
        return inputs.double() @ self.weights.T + self.bias > 0


def drawn_traps(units: int, inputs: int, factor: float, signs: Signs, generator: torch.Generator) -> Traps:
    """Magnitudes |N(0, 1)|; `independent`: every weight is negative with probability 1/2, the others are `factor` times
    as large. `mirrored`: half of a row's weights, drawn at random, are negative, and the others repeat their magnitudes
    times `factor` (Boenisch et al., section 5; equal up to the factor, so that a row's sum is nearly zero).
    """
    shape = (units, inputs)
    if signs == "independent":
        sizes = torch.randn(shape, dtype=torch.float64, generator=generator).abs()
        up = torch.rand(shape, generator=generator) < 0.5
        return Traps(-sizes * ~up, sizes * up, factor, torch.zeros(units, dtype=torch.float64))
    half = inputs // 2
    sizes = torch.randn((units, half), dtype=torch.float64, generator=generator).abs()
    order = torch.rand(shape, generator=generator).argsort(dim=1)
    negative, positive = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    negative.scatter_(1, order[:, :half], -sizes)
    positive.scatter_(1, order[:, half : 2 * half], sizes)
    return Traps(negative, positive, factor, torch.zeros(units, dtype=torch.float64))


def with_factor(traps: Traps, inputs: Tensor, share: float) -> Traps:
    """The factor with which the mean unit is active for this share of the layer's inputs (N, D), biases being zero.

    Where inputs have negative values too, it is the smallest such factor that halving finds.
    """
    inputs = inputs[:MOST_IMAGES].double()
    against, in_favor = inputs @ traps.negative.T, inputs @ traps.positive.T
    low, high = 0.0, 1.0
    while float((against + high * in_favor > 0).double().mean()) < share and high < WIDEST:
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = float((against + middle * in_favor > 0).double().mean()) >= share
        low, high = (low, middle) if enough else (middle, high)
    return replace(traps, factor=high)


def with_thresholds(traps: Traps, inputs: Tensor, share: float) -> Traps:
    """Biases with which every unit is active for this share of the layer's inputs (N, D), one by one."""
    values = inputs.double() @ traps.weights.T
    return replace(traps, bias=-values.kthvalue(math.ceil((1 - share) * len(values)), dim=0).values)


def readable(active: Tensor) -> Tensor:
    """Which images (N,) are the only ones in at least one unit, from which units they activate (N, K)."""
    return (active & (active.sum(dim=0) == 1)).any(dim=1)


def inputs_of(model: GlobalModel, layer: DenseLayer, images: Tensor) -> Tensor:
    """What the layer receives for images (N, C, *spatial): (N, inputs)."""
    with torch.no_grad():
        return layer_input(model, layer, images)

"""The batch-norm prior: what batch norm layers receive of a candidate has the mean and variance that are expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.attacks.batch_statistics import KnownStatistics
from medpfl.models.batch_norm import Statistics


@dataclass(frozen=True)
class StatisticsPrior:
    """Per victim and layer, what is expected and how much it counts.

    layers: paths of batch norm layers. weights: (V, layers), 0 where a victim shows nothing. means, variances: per
    layer (V, C), variances without Bessel's correction.
    """

    layers: tuple[str, ...]
    weights: Tensor
    means: tuple[Tensor, ...]
    variances: tuple[Tensor, ...]

    def expected(self, victims: Tensor | int) -> list[Tensor]:
        """What `statistics_distance` takes, for these victims."""
        return [tensor[victims] for tensor in (self.weights, *self.means, *self.variances)]


def statistics_distance(found: Sequence[tuple[Tensor, Tensor]], expected: Sequence[Tensor]) -> Tensor:
    """Sum over layers of weight * (|mean - expected mean| + |variance - expected variance|) of one candidate.

    Euclidean norms over the channels (Yin et al. 2021, section 3.3). found: mean and variance (C,) per layer. expected:
    weights (layers,), then the means of all layers, then their variances.

    >>> one = [(torch.zeros(2), torch.ones(2))]
    >>> float(statistics_distance(one, [torch.tensor([10.0]), torch.tensor([3.0, 4.0]), torch.ones(2)]))
    50.0
    """
    count = len(found)
    weights, means, variances = expected[0], expected[1 : 1 + count], expected[1 + count :]
    terms = [
        torch.linalg.vector_norm(mean - expected_mean) + torch.linalg.vector_norm(variance - expected_variance)
        for (mean, variance), expected_mean, expected_variance in zip(found, means, variances, strict=True)
    ]
    return (torch.stack(terms) * weights).sum()


def statistics_prior(
    known: Sequence[KnownStatistics], weight: float, first_layer: float, like: Tensor
) -> StatisticsPrior | None:
    """The prior of several victims of one architecture; None where none of them shows statistics or nothing is weighted.

    like: a tensor of the search's precision and device. first_layer: how many times as much as the others the first batch norm layer counts.
    """
    layers = next((tuple(one.layers) for one in known if one.layers), ())
    if not layers or weight == 0.0:
        return None
    example = next(one.layers for one in known if one.layers)
    weights = like.new_full((len(known), len(layers)), weight)
    weights[:, 0] *= first_layer
    weights[[index for index, one in enumerate(known) if not one.layers]] = 0.0

    def stacked(path: str, part: int) -> Tensor:
        return torch.stack([(one.layers or example)[path][part] for one in known]).to(like)

    means = tuple(stacked(path, 0) for path in layers)
    return StatisticsPrior(layers, weights, means, tuple(stacked(path, 1) for path in layers))


def in_order(statistics: Statistics, layers: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of the layers, in their order."""
    return [statistics[path] for path in layers]

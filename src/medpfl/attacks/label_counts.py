"""How often each class occurs in a batch, from the gradient of the classification layer.

For the mean cross entropy of b images with softmax outputs p and k_i images of class i,

    d loss / d bias_i = mean(p_i) - k_i / b          d loss / d weight_i = mean over images of (p_i - [class i]) features

so the counts follow from mean(p). What the images' features have in common is read from the two gradients: if all were
equal, every row of the weight's gradient would be the bias' entry times the features. Where the bias' entries are
small that says little, so it is drawn towards the features of dummy images (ridge regression). Then each class gets
the smallest deviation from these shared features that explains the rest of the weight's gradient, and mean(p) is the
mean over classes of the outputs, weighted with the counts; the two are repeated a few times. The counts of iLRG (Ma et
al. 2023) take each class' row divided by its bias entry instead, which breaks down where the entry is near zero.

Updates of several local steps are treated as in Dimitrov et al. 2022 (after Geng et al. 2021): head and
features are interpolated between the model before and after, and outputs averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TRUST_EVAL = 0.1
"""Weight of dummy features against the squared bias gradient where features depend on each image alone."""

TRUST_TRAIN = 1.0
"""The same where batch norm fixes the mean feature of a batch whatever the images: dummy batches say it best."""

SMALLEST_DEVIATION = 0.01
"""Ridge on the features of single classes."""

ROUNDS = 10


@dataclass(frozen=True)
class Moment:
    """The classification layer at one time of the client's training, and what dummy images give there, in float64.

    weight: (classes, inputs). bias: (classes,). features: (M, inputs).
    """

    weight: Tensor
    bias: Tensor
    features: Tensor


def estimate_counts(
    moments: Sequence[Moment], weight_gradient: Tensor, bias_gradient: Tensor, examples: int, batch_statistics: bool
) -> Tensor:
    """Images per class (classes,), not rounded, for the mean gradient over the moments.

    batch_statistics: whether features were normalized with the statistics of their batch.
    """
    trust = TRUST_TRAIN if batch_statistics else TRUST_EVAL
    dummy = torch.stack([moment.features.mean(dim=0) for moment in moments]).mean(dim=0)
    shared = (weight_gradient.T @ bias_gradient + trust * dummy) / (bias_gradient.square().sum() + trust)
    outputs = _outputs(moments, (shared - dummy)[None]).expand(len(bias_gradient), -1)
    counts = examples * (outputs[0] - bias_gradient)
    if batch_statistics:
        return counts
    identity = torch.eye(len(bias_gradient), dtype=torch.float64)
    rest = weight_gradient - torch.outer(bias_gradient, shared)
    for _ in range(ROUNDS):
        shares = on_simplex(counts, examples) / examples
        system = (outputs.T - identity) * shares
        deviations = system.T @ torch.linalg.solve(system @ system.T + SMALLEST_DEVIATION * identity, rest)
        outputs = _outputs(moments, shared - dummy + deviations)
        counts = 0.5 * counts + 0.5 * examples * (shares @ outputs - bias_gradient)
    return counts


def _outputs(moments: Sequence[Moment], shifts: Tensor) -> Tensor:
    """Mean softmax output (S, classes) of the dummy features moved by each of the shifts (S, inputs)."""
    found = []
    for moment in moments:
        scores = moment.features @ moment.weight.T + moment.bias
        moved = shifts @ moment.weight.T
        found.append(torch.softmax(scores[None] + moved[:, None], dim=-1).mean(dim=1))
    return torch.stack(found).mean(dim=0)


def round_to_sum(estimate: Tensor, total: int) -> Tensor:
    """The whole numbers >= 0 with sum `total` that are nearest to `estimate` (classes,), however far off that is.

    The estimate is moved to the nearest point of the simplex; there the floors go up by the largest remainders.

    >>> round_to_sum(torch.tensor([0.9, -0.2, 1.4]), 2).tolist()
    [1, 0, 1]
    >>> round_to_sum(torch.tensor([3e12, -5e11, 7.0]), 2).tolist()
    [2, 0, 0]
    """
    projected = on_simplex(estimate.double().nan_to_num(), total)
    counts = projected.floor().long()
    lacking = total - int(counts.sum())
    if lacking > 0:
        counts[(projected - counts).argsort(descending=True, stable=True)[:lacking]] += 1
    return counts


def on_simplex(point: Tensor, total: int) -> Tensor:
    """The nearest point with entries >= 0 and sum `total` (Held, Wolfe, Crowder 1974)."""
    from_top = point - point.max()
    ordered = from_top.sort(descending=True).values
    ranks = torch.arange(1, len(point) + 1, dtype=point.dtype)
    thresholds = (ordered.cumsum(0) - total) / ranks
    kept = int((ordered > thresholds).sum())
    return (from_top - thresholds[kept - 1]).clamp(0.0, float(total))

"""Low rank: the factor that was sent says which linear measurements of the gradient the other one holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medpfl.attacks.matching.likelihoods.base import Likelihood, View, likelihood_of
from medpfl.attacks.matching.likelihoods.rounds import Compressed, compressed
from medpfl.core.mechanisms import LowRank

NOTHING = 1e-6
"""Share of the largest singular value below which others are rounding."""


@likelihood_of(LowRank)
def low_rank(mechanism: LowRank, view: View) -> Likelihood:
    """|P^T G - Q^T|^2 for matrices, where P Q^T was sent with orthonormal columns P; squared differences for the rest.

    Rounds with different factors give different measurements.
    """
    rounds = list(compressed(view))
    evidence = tuple(
        torch.cat([_measured(one, place, mechanism.rank) for one in rounds], dim=2)
        if mechanism.applies(target.shape[1:])
        else target
        for place, target in enumerate(view.targets)
    )
    return Likelihood(measured_distance, evidence=evidence)


def measured_distance(gradients: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Squared differences of tensors, or of what their targets (rows + columns, measurements) measure of them.

    >>> target = torch.tensor([[1.0], [0.0], [5.0], [6.0]])  # the first row of a matrix is (5, 6)
    >>> measured_distance([torch.tensor([[5.0, 7.0], [9.0, 9.0]])], [target], torch.ones(1))
    tensor(1.)
    """
    terms = []
    for gradient, target in zip(gradients, targets, strict=True):
        if target.shape == gradient.shape:
            terms.append((gradient - target).square().sum())
        else:
            left, right = target[: gradient.shape[0]], target[gradient.shape[0] :]
            terms.append((gradient.flatten(1).T @ left - right).square().sum())
    return (torch.stack(terms) * weights).sum()


def _measured(one: Compressed, place: int, rank: int) -> Tensor:
    """P above Q, (V, rows + columns, rank), of one round, as measurements of the gradient itself."""
    message = one.message[place].flatten(2) if one.message[place].ndim > 2 else one.message[place]
    before = one.before[place].reshape(message.shape)
    left, values, _ = torch.linalg.svd(message, full_matrices=False)
    left, values = left[:, :, :rank], values[:, :rank]
    left = left * (values > NOTHING * values[:, :1])[:, None]
    right = (message + before).transpose(1, 2) @ left / one.times
    return torch.cat([left, right], dim=1)

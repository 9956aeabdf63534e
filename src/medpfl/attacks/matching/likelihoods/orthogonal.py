"""CENSOR: what was sent is orthogonal to the gradient, tensor by tensor, and has its norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medpfl.attacks.matching.likelihoods.base import Likelihood, View, even, likelihood_of
from medpfl.attacks.matching.likelihoods.rounds import compressed
from medpfl.core.mechanisms import OrthogonalDirection

SURE = 1.0
"""Standard deviation of a tensor's ratio of norms and of its cosine. Both are known exactly, but taken at their word they lead
searches far away: of 0.01, 0.1 and 1 this did best on development victims."""

TINY = 1e-30


@likelihood_of(OrthogonalDirection)
def orthogonal_direction(_mechanism: OrthogonalDirection, view: View) -> Likelihood:
    """Sum over tensors of ((|g| / |r| - 1)^2 + cos(g, r)^2) / (2 SURE^2), the cosine of every round's r."""
    rounds = [one.message for one in compressed(view)]
    evidence = tuple(torch.stack([one[place] for one in rounds], dim=1) for place in range(len(view.names)))
    return Likelihood(orthogonal_distance, evidence=evidence, weights=even(view, 0.5 / SURE**2), nats=True)


def orthogonal_distance(gradients: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor) -> Tensor:
    """See `orthogonal_direction`; targets (rounds, *shape). A target of zeros says nothing.

    >>> target = torch.tensor([[0.0, 2.0]])
    >>> orthogonal_distance([torch.tensor([2.0, 0.0])], [target], torch.ones(1))
    tensor(0.)
    >>> orthogonal_distance([torch.tensor([0.0, 4.0])], [target], torch.ones(1))
    tensor(2.)
    """
    terms = []
    for gradient, target in zip(gradients, targets, strict=True):
        flat, sent = gradient.reshape(-1), target.reshape(len(target), -1)
        norm, known = (flat.square().sum() + TINY).sqrt(), (sent.square().sum(dim=1) + TINY).sqrt()
        cosines = sent @ flat / (norm * known)
        error = (norm / known[0] - 1.0).square() + cosines.square().sum()
        terms.append(torch.where((sent[0] != 0).any(), error, 0.0))
    return (torch.stack(terms) * weights).sum()

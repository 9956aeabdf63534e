"""Independent noise on every entry: absolute differences for Laplace noise, squared ones for normal noise."""

from __future__ import annotations

import torch
from torch import Tensor

from medpfl.attacks.matching.likelihoods.base import Likelihood, View, even, likelihood_of
from medpfl.attacks.matching.objectives import absolute_distance, squared_distance
from medpfl.core.mechanisms import Adapters, GaussianNoise, LaplaceNoise, Mechanism, Shared, Unchanged


def unchanged(_mechanism: Mechanism, view: View) -> Likelihood:
    """What is sent is sent as it is: the squared distance from the mean of all rounds."""
    return Likelihood(evidence=_mean(view))


for exact in (Unchanged, Shared, Adapters):
    likelihood_of(exact)(unchanged)


@likelihood_of(LaplaceNoise)
def laplace(mechanism: LaplaceNoise, view: View) -> Likelihood:
    """Laplace noise of scale b: sum |g - G| / b, over all rounds with fresh noise."""
    rounds = tuple(torch.stack(several, dim=1) for several in zip(*view.earlier, view.targets, strict=True))
    return Likelihood(
        distance=absolute_distance,
        evidence=rounds if view.earlier else None,
        weights=even(view, view.scale / mechanism.scale),
        nats=True,
    )


@likelihood_of(GaussianNoise)
def gaussian(mechanism: GaussianNoise, view: View) -> Likelihood:
    """Normal noise of deviation s: sum (g - G)^2 / (2 s^2); over R rounds R times that from their mean."""
    factor = 0.5 * (1 + len(view.earlier)) * (view.scale / mechanism.std) ** 2
    return Likelihood(distance=squared_distance, evidence=_mean(view), weights=even(view, factor), nats=True)


def _mean(view: View) -> tuple[Tensor, ...] | None:
    """Of the targets of all rounds; None for a single one."""
    if not view.earlier:
        return None
    rounds = zip(*view.earlier, view.targets, strict=True)
    return tuple(torch.stack(several).mean(dim=0) for several in rounds)

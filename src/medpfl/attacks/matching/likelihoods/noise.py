"""Independent noise on every entry: absolute differences for Laplace noise, squared ones for normal noise."""

from __future__ import annotations

from medpfl.attacks.matching.likelihoods.base import Likelihood, View, even, likelihood_of
from medpfl.attacks.matching.objectives import absolute_distance, squared_distance
from medpfl.core.mechanisms import Adapters, GaussianNoise, LaplaceNoise, Mechanism, Shared, Unchanged


def unchanged(_mechanism: Mechanism, _view: View) -> Likelihood:
    """What is sent is sent as it is: the squared distance."""
    return Likelihood()


for exact in (Unchanged, Shared, Adapters):
    likelihood_of(exact)(unchanged)


@likelihood_of(LaplaceNoise)
def laplace(mechanism: LaplaceNoise, view: View) -> Likelihood:
    """Laplace noise of scale b: sum |g - G| / b."""
    return Likelihood(distance=absolute_distance, weights=even(view, view.scale / mechanism.scale), nats=True)


@likelihood_of(GaussianNoise)
def gaussian(mechanism: GaussianNoise, view: View) -> Likelihood:
    """Normal noise of deviation s: sum (g - G)^2 / (2 s^2)."""
    return Likelihood(distance=squared_distance, weights=even(view, 0.5 * (view.scale / mechanism.std) ** 2), nats=True)

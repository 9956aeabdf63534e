"""A client's defense as an attacker plays it through who knows its mechanism."""

from __future__ import annotations

from medpfl.core.mechanisms import GaussianNoise, LaplaceNoise, Mechanism
from medpfl.defenses.gaussian import Gaussian
from medpfl.defenses.laplace import Laplace
from medpfl.federation.hooks import NO_HOOKS, Hooks


def known_defense(mechanism: Mechanism | None) -> Hooks:
    """The defense with that mechanism; none where it is not known or not understood.

    >>> known_defense(LaplaceNoise(0.5))
    Laplace(scale=0.5)
    """
    if isinstance(mechanism, LaplaceNoise):
        return Laplace(scale=mechanism.scale)
    if isinstance(mechanism, GaussianNoise):
        return Gaussian(std=mechanism.std)
    return NO_HOOKS

"""A client's defense as an attacker plays it through who knows its mechanism."""

from __future__ import annotations

from medpfl.core.mechanisms import (
    Clipped,
    ClippedSteps,
    Composed,
    GaussianNoise,
    LaplaceNoise,
    Mechanism,
    ThreeValues,
)
from medpfl.defenses import DPSGD, Clip, Composition, Defense, Gaussian, Laplace, LocalDP, NoDefense


def known_defense(mechanism: Mechanism | None) -> Defense:
    """The defense with that mechanism; none where it is not known or not understood.

    >>> known_defense(LaplaceNoise(0.5))
    Laplace(scale=0.5)
    """
    found = _understood(mechanism)
    return NoDefense() if found is None else found


def _understood(mechanism: Mechanism | None) -> Defense | None:
    match mechanism:
        case LaplaceNoise(scale=scale):
            return Laplace(scale=scale)
        case GaussianNoise(std=std):
            return Gaussian(std=std)
        case Clipped(bound=bound, norm=norm):
            return Clip(bound=bound, norm=norm)
        case ClippedSteps():
            return DPSGD.of(mechanism)
        case ThreeValues(epsilon=epsilon, length=length):
            return LocalDP(epsilon=epsilon, length=length)
        case Composed(parts=parts):
            played = [_understood(part) for part in parts]
            known = [part for part in played if part is not None]
            return Composition(tuple(known)) if len(known) == len(played) else None
    return None

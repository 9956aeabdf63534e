"""What a defense does to an update, as data: what an adversary who knows the defense is told.

A defense states its mechanism; `medpfl.attacks.matching` turns mechanisms into likelihoods. Attacks that do not
understand a mechanism ignore it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mechanism:
    """Base of all mechanisms."""


@dataclass(frozen=True)
class Unchanged(Mechanism):
    """The update is sent as it is."""


@dataclass(frozen=True)
class LaplaceNoise(Mechanism):
    """Independent Laplace(0, scale) noise on every trainable entry."""

    scale: float


@dataclass(frozen=True)
class GaussianNoise(Mechanism):
    """Independent normal noise with standard deviation `std` on every trainable entry."""

    std: float


@dataclass(frozen=True)
class Composed(Mechanism):
    """Several mechanisms, each applied to what the one before it left."""

    parts: tuple[Mechanism, ...]

"""What a defense does to an update, as data: what an adversary who knows the defense is told.

A defense states its mechanism; `medpfl.attacks.matching` turns mechanisms into likelihoods. Attacks that do not
understand a mechanism ignore it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


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


NormKind = Literal["l2", "l1"]
"""How long a whole update is: the root of the summed squares of all its entries, or the sum of their absolute values."""


@dataclass(frozen=True)
class Clipped(Mechanism):
    """The whole update (the change, where weights are sent) scaled down to a norm of at most `bound`."""

    bound: float
    norm: NormKind = "l2"


@dataclass(frozen=True)
class ClippedSteps(Mechanism):
    """In every local step each image's gradient scaled down to an L2 norm of at most `bound`, their sum with normal noise
    of deviation `noise_multiplier * bound` divided by the batch size.

    per_tensor: every tensor on its own is scaled down to bound / sqrt(number of tensors). sampled: every image takes part
    in a step with probability batch size over number of images, so nobody knows how many did.
    """

    bound: float
    noise_multiplier: float
    per_tensor: bool = False
    sampled: bool = False


@dataclass(frozen=True)
class ThreeValues(Mechanism):
    """Every entry of the change v, cut off at +-length / 2, is sent as one of three numbers: 0 or +-magnitude.

    With E = exp(epsilon), +magnitude has probability v (E - 1) / (length (E + 2)) + (E + 1) / (2 (E + 2)), 0 has
    1 / (E + 2); the mean is v.
    """

    epsilon: float
    length: float

    @property
    def magnitude(self) -> float:
        """The size of what is sent, length * (E + 2) / (2 (E - 1)).

        >>> ThreeValues(epsilon=1.0, length=2.0).magnitude > 1.0
        True
        """
        return self.length * (math.exp(self.epsilon) + 2.0) / (2.0 * math.expm1(self.epsilon))

"""What a defense does to an update, as data: what an adversary who knows the defense is told.

A defense states its mechanism; `medpfl.attacks.matching` turns mechanisms into likelihoods. Attacks that do not
understand a mechanism ignore it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
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


Scope = Literal["tensor", "global"]
"""Whether entries compete within their tensor or over all tensors."""


@dataclass(frozen=True)
class Pruned(Mechanism):
    """Entries below this percentile of the magnitudes in their scope are zero, the others as they are."""

    percentile: float
    scope: Scope = "tensor"

    def survivors(self, entries: int) -> int:
        """How many of so many entries at least survive."""
        return entries - math.ceil(self.percentile / 100 * (entries - 1))


@dataclass(frozen=True)
class TopK(Mechanism):
    """The largest magnitudes in their scope are as they are, all others zero."""

    share: float
    scope: Scope = "tensor"

    def survivors(self, entries: int) -> int:
        """How many of so many entries survive."""
        return math.ceil(self.share * entries)


@dataclass(frozen=True)
class RandomK(Mechanism):
    """A share of each tensor's entries, drawn at random, survives; all others are zero.

    unbiased: whether survivors are multiplied by entries / survivors.
    """

    share: float
    unbiased: bool = True

    def survivors(self, entries: int) -> int:
        """How many of so many entries survive."""
        return math.ceil(self.share * entries)

    def factor(self, entries: int) -> float:
        """What the survivors of so many entries were multiplied by."""
        return entries / self.survivors(entries) if self.unbiased else 1.0


@dataclass(frozen=True)
class Signs(Mechanism):
    """The sign of every entry, times the mean magnitude of its tensor if `scaled`."""

    scaled: bool = True


@dataclass(frozen=True)
class Quantized(Mechanism):
    """Entries of a block (a tensor without `block`) are whole multiples of a step, at most `levels` on either side.

    The step is the block's largest magnitude (`scale: max`) or its norm over `levels`.
    """

    levels: int
    scale: Literal["max", "norm"] = "max"
    stochastic: bool = False
    block: int | None = None


@dataclass(frozen=True)
class CutOff(Mechanism):
    """Entries of larger magnitude are put to +-`bound`, the others are as they are.

    sparse: before that, the smallest magnitudes of all tensors together were put to zero.
    """

    bound: float
    sparse: bool = False


@dataclass(frozen=True)
class LowRank(Mechanism):
    """Matrices (first axis x rest) are projected onto `rank` orthonormal columns where that saves enough."""

    rank: int
    minimum_ratio: float = 2.0

    def applies(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape is compressed: its entries over those of both factors exceed the ratio."""
        if len(shape) < 2:
            return False
        rows, columns = shape[0], math.prod(shape[1:])
        return rows * columns > self.minimum_ratio * self.rank * (rows + columns)


@dataclass(frozen=True)
class OrthogonalDirection(Mechanism):
    """Every tensor of a gradient was replaced by a random one, orthogonal to it and of its norm."""


@dataclass(frozen=True)
class Shared(Mechanism):
    """Only some tensors are sent: trainable ones named like `tensors` (all if None), buffers and counters if `buffers`."""

    buffers: bool
    tensors: tuple[str, ...] | None = None
    frozen: tuple[str, ...] = ()


def sent_names(mechanism: Mechanism, names: Iterable[str]) -> list[str]:
    """Which of these trainable tensors clients with such a defense send.

    >>> sent_names(Shared(buffers=False, tensors=("fc.*",)), ["body.weight", "fc.weight"])
    ['fc.weight']
    """
    if isinstance(mechanism, Composed):
        for part in mechanism.parts:
            names = sent_names(part, names)
    if isinstance(mechanism, Shared) and mechanism.tensors is not None:
        names = [name for name in names if named_like(name, mechanism.tensors)]
    return list(names)


def named_like(name: str, patterns: Iterable[str]) -> bool:
    """Whether a tensor's name fits one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Adapters(Mechanism):
    """Layers are trained, and sent, as products of two factors of this rank that are added to frozen weights."""

    rank: int


@dataclass(frozen=True)
class ErrorFeedback(Mechanism):
    """Before `part`, what it left out in earlier rounds is added to the update."""

    part: Mechanism


@dataclass(frozen=True)
class MaskedFeatures(Mechanism):
    """Columns of the classifier's weight gradient are zero for this percentage of its input features."""

    percentile: float


@dataclass(frozen=True)
class StochasticLayer(Mechanism):
    """The classifier and the layer before it saw features with noise that only the client knows."""


@dataclass(frozen=True)
class Mixtures(Mechanism):
    """Every training image is a mean, with random weights, of so many images of the batch; with `signs` every pixel p was
    turned into 1 - p at random."""

    images: int
    signs: bool = False


@dataclass(frozen=True)
class Augmented(Mechanism):
    """Every training image was changed by one of these sequences of operations (names with strengths), drawn at random."""

    sequences: tuple[tuple[tuple[str, float], ...], ...]

"""Which units of a layer, or pairs of them, hold the gradient of a single sample, seen from a client that knows all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IDLE = 1e-3
"""Behind an activation without exact zeros a unit is idle for a sample below this share of other units and samples."""

MOST_SAMPLES_PER_UNIT = 4
"""With more samples per unit, bins hold several samples each, and differences of units are not looked at."""

ALONE = 0.9
"""Share of a read-out from which on a sample counts as alone in it."""


FEWEST_SETS = 4
MOST_SETS = 1024
"""Of so many different sets it is looked at how they cross."""


@dataclass(frozen=True)
class Readouts:
    """Rows of a layer's gradient, less a multiple of another row each: (M,) unit, other (-1: none), factor.

    sample: the one that each shows, if it shows any. purity: that sample's share of the squared sum of all samples'
    contributions, 1 where it is alone.
    """

    unit: Tensor
    other: Tensor
    factor: Tensor
    sample: Tensor
    purity: Tensor

    def __len__(self) -> int:
        return len(self.unit)

    def purest(self, most: int, always: float) -> Readouts:
        """The `most` purest, and all that are at least as pure as `always`."""
        order = self.purity.argsort(descending=True, stable=True)
        return self._at(order[: max(most, int((self.purity >= always).sum()))])

    def chunks(self, size: int) -> Iterator[Readouts]:
        """All, so many at a time."""
        for start in range(0, len(self), size):
            yield self._at(torch.arange(start, min(start + size, len(self))))

    def _at(self, places: Tensor) -> Readouts:
        return Readouts(*(getattr(self, name)[places] for name in ("unit", "other", "factor", "sample", "purity")))


def readouts(errors: Tensor, squares: Tensor, parts: Sequence[Tensor] = ()) -> Readouts:
    """All units, and pairs of units whose sets of active samples differ in one sample.

    Sets are compared in place of neighbors in some order, so that neither permuted units nor signs and sizes of rows
    and columns hide a chain of bins. errors: (units, S). squares: (S,) squared lengths of the samples. parts: places of
    the samples of every local step, if there are several: pairs are looked for within each, too.
    """
    everything = torch.arange(errors.shape[1], device=errors.device)
    found = []
    for part in (everything, *(parts if len(parts) > 1 else ())):
        own, lengths = errors[:, part].double(), squares[part].double()
        units = torch.arange(len(own), device=own.device)
        none = torch.full_like(units, -1)
        found.append(_judged(own, lengths, part, units, none, torch.zeros_like(units, dtype=own.dtype)))
        if own.shape[1] <= MOST_SAMPLES_PER_UNIT * len(own):
            exact, almost = own != 0, nearly_active(own)
            for active in (exact,) if bool((exact == almost).all()) else (exact, almost):
                found.append(_judged(own, lengths, part, *pairs_around_one(own, active)))
    fields = ("unit", "other", "factor", "sample", "purity")
    return Readouts(*(torch.cat([getattr(one, name) for one in found]) for name in fields))


def pairs_around_one(errors: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Units i and j, where j is active for all samples that i is active for but one: (i, j, factor).

    errors (units, S); active (units, S): for which samples a unit counts as active.

    errors_i - factor * errors_j is smallest on the samples that they share. Of units that are active for the same
    samples one stands for all.

    >>> errors = torch.tensor([[1.0, 2.0, 4.0], [0.0, -1.0, -2.0], [0.0, 0.0, 3.0]])
    >>> [found.tolist() for found in pairs_around_one(errors, errors != 0)]
    [[1, 0], [2, 1], [-0.6666666666666666, -2.0]]
    """
    units = _one_per_set(active, errors)
    sets, sizes = active[units].double(), active[units].sum(dim=1)
    pairs = []
    for size in distinct(sizes).tolist():
        larger, smaller = (sizes == size).nonzero().flatten(), (sizes == size - 1).nonzero().flatten()
        if size < 2 or not len(smaller):
            continue
        inside = (sets[larger] @ sets[smaller].T).round() == size - 1
        first, second = inside.nonzero(as_tuple=True)
        pairs.append(torch.stack([units[larger[first]], units[smaller[second]]]))
    both = torch.cat(pairs, dim=1) if pairs else torch.zeros((2, 0), dtype=torch.long, device=errors.device)
    first, second = both
    shared = torch.where(active[second], errors[second].double(), 0.0)
    factor = (errors[first].double() * shared).sum(dim=1) / shared.square().sum(dim=1).clamp_min(1e-300)
    return first, second, factor


def nearly_active(errors: Tensor) -> Tensor:
    """Which samples give a unit an error that counts, (units, S), where activations are never quite zero.

    >>> nearly_active(torch.tensor([[1.0, 2.0], [5.0, 0.001]])).tolist()
    [[True, True], [True, False]]
    """
    sizes = errors.abs().double()
    by_sample = sizes / sizes.amax(dim=0, keepdim=True).clamp_min(1e-300)
    by_unit = by_sample / by_sample.amax(dim=1, keepdim=True).clamp_min(1e-300)
    return by_unit > IDLE


@dataclass(frozen=True)
class Chance:
    """What an honest layer would do by chance: share of samples that it gives back, and of units that cross."""

    share: float
    crossing: float | None


def chance(samples: Tensor, units: int) -> Chance:
    """What a freshly drawn layer of so many units with ReLU behind it gives back of these samples (S, D).

    Weights and bias normal and of one size, as initializations draw them; they are not drawn themselves but the units'
    values, whose covariance over samples is samples @ samples.T + 1. All units are given errors of one sign pattern,
    with which most comes back. A sample counts as given back where it makes up 0.9 of a read-out. Always the same draw.

    >>> images = torch.rand(64, 784, generator=torch.Generator().manual_seed(0))
    >>> chance(images[:1], 512).share, chance(images, 512).share < chance(images[:16], 512).share
    (1.0, True)
    """
    rows = samples.double()
    covariance = rows @ rows.T + 1.0
    covariance = covariance / covariance.diagonal().mean()
    root = torch.linalg.cholesky(covariance + 1e-6 * torch.eye(len(rows), dtype=rows.dtype, device=rows.device))
    draw = torch.randn(units, len(rows), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = (draw.to(root) @ root.T > 0).double()
    found = readouts(errors, rows.square().sum(dim=1))
    share = len(distinct(found.sample[found.purity >= ALONE])) / len(rows)
    return Chance(share, crossing(errors))


def crossing(errors: Tensor) -> float | None:
    """Of all pairs of units that are active for different samples, the share that cross. errors: (units, S).

    Two sets of samples cross if some samples are in both, some in either alone, and some in neither. Sets that come
    from thresholds of one number never do, whichever unit has which threshold and whichever side it takes; nor do sets
    of one sample each. Sets of honest units mostly do. None with fewer than 4 different sets.

    >>> crossing(torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]])), crossing(torch.ones(9, 4))
    (0.0, None)
    >>> round(crossing(torch.tensor([[1.0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 0]])), 2)
    0.5
    """
    units = _one_per_set(errors != 0, errors)[:MOST_SETS]
    if len(units) < FEWEST_SETS:
        return None
    sets = (errors[units] != 0).double()
    both, sizes = (sets @ sets.T).round(), sets.sum(dim=1)
    first, second = sizes[:, None] - both, sizes[None, :] - both
    neither = errors.shape[1] - both - first - second
    crossed = (both > 0) & (first > 0) & (second > 0) & (neither > 0)
    return float(crossed.sum()) / (len(units) * (len(units) - 1))


def distinct(values: Tensor) -> Tensor:
    """The different values of (M,) whole numbers, ascending.

    >>> distinct(torch.tensor([2, 1, 2])).tolist()
    [1, 2]
    """
    ordered = values.sort().values
    new = torch.ones(len(ordered), dtype=torch.bool, device=values.device)
    new[1:] = ordered[1:] != ordered[:-1]
    return ordered[new]


def _judged(errors: Tensor, squares: Tensor, part: Tensor, unit: Tensor, other: Tensor, factor: Tensor) -> Readouts:
    left = errors[unit] - factor[:, None] * errors[other.clamp_min(0)] if bool((other >= 0).any()) else errors[unit]
    shares = left.square() * squares
    largest, sample = shares.max(dim=1)
    purity = largest / shares.sum(dim=1).clamp_min(1e-300)
    return Readouts(unit, other, factor, part[sample], purity)


def _one_per_set(active: Tensor, errors: Tensor) -> Tensor:
    """Units with different sets of active samples: of equal ones that with the largest errors."""
    hashes = _hashes(active)
    order = errors.double().square().sum(dim=1).argsort(descending=True, stable=True)
    values = distinct(hashes)
    group = torch.searchsorted(values, hashes[order])
    first = torch.full((len(values),), len(order), dtype=torch.long, device=active.device)
    places = torch.arange(len(order), device=active.device)
    return order[first.scatter_reduce(0, group, places, reduce="amin")]


def _hashes(active: Tensor) -> Tensor:
    """One whole number per row, equal for equal rows and different for different ones (but for 1 in 2^60)."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**62), 2**62, (active.shape[1],), generator=generator).to(active.device)
    return (active.long() * keys).sum(dim=1)

"""Reads bins of several queries by peeling: certified single images are taken out, which frees others they share bins with.

A certificate needs no truth and no pixel grid. The gradients of K units are K combinations of N images, so that the
patterns in which images activate units span all of them: N dimensions out of K. What a bin shows is an image only if
its own pattern, which follows from its values of all queries, lies in that space. A mixture's pattern does not, as long
as the images are fewer than the units, and different enough not to be combinations of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.attacks.bin_readout import TOLERANCE, Candidates, how_far_off
from medpfl.attacks.query_bins import QueryBins
from medpfl.core.memory import room

ABOVE_NOISE = 3.0
"""Directions of the gradients count as signal if their energy is so many times that of rounding."""

AS_EXPECTED = 1000.0
"""A pattern is certified if what lies outside the space is at most so many times what even rounding explains (float32
weights round alike in units with the same gradient, which piles up; what is no image is off by far more) ..."""

MOST_OUTSIDE = 0.2
"""... and at most this share of what one unit alone would have outside."""

QUIET = 4.0
"""A bin counts as empty if what it still holds is at most so many times what rounding explains."""

EXACT = 1e-12
"""What float64 itself leaves outside."""

RIDGE = 1e-8
"""Keeps least squares solvable should a wrong pattern depend on right ones."""

HALF = 0.5
"""Share of its bin's width by which the value of a candidate may miss the bin."""


SAMPLED = 4096
"""Entries of images that peeling looks at; of larger ones evenly spaced entries stand for all until the images are made."""

AT_ONCE = 8192
"""Columns of the gradients that are turned into double precision together."""


@dataclass(frozen=True)
class Gradients:
    """The gradients of K units whose images have `inputs` entries.

    columns: gives those of the weights in a slice of the inputs, (K, n) float64. bias: (K,) float64.
    """

    columns: Callable[[slice], Tensor]
    bias: Tensor
    inputs: int

    def parts(self) -> Iterator[slice]:
        """All columns, as many at a time as are worth a call."""
        return (slice(first, min(first + AT_ONCE, self.inputs)) for first in range(0, self.inputs, AT_ONCE))

    def combined(self, weights: Tensor) -> Tensor:
        """Images (m, D), float32, whose gradients are these combinations (m, K) of the units'."""
        images = room((len(weights), self.inputs), weights.device)
        weights = weights / (weights @ self.bias)[:, None]
        for part in self.parts():
            images[:, part] = (weights @ self.columns(part)).float()
        return images


@dataclass(frozen=True)
class _Seen:
    """What peeling works on: rows (K, S + Q + 1) of S sampled entries of the weights' gradients, of what the Q queries
    measure of all of them, and of the biases' gradients. Every combination of units combines these columns alike."""

    rows: Tensor
    queries: int

    @property
    def entries(self) -> Tensor:
        """Without the queries, (K, S + 1): what rounding is judged by."""
        return torch.cat([self.rows[:, : -1 - self.queries], self.rows[:, -1:]], dim=1)

    def images(self, gradients: Tensor) -> Tensor:
        """The sampled entries (m, S) of the images with these gradients (m, S + Q + 1)."""
        return gradients[:, : -1 - self.queries] / gradients[:, -1:]

    def values(self, gradients: Tensor) -> Tensor:
        """What the queries measure of these images, (m, Q)."""
        return gradients[:, -1 - self.queries : -1] / gradients[:, -1:]


@dataclass(frozen=True)
class _Known:
    """Certified images: patterns (K, n) of ones and zeros, the units (n,) whose bins they were read from, the combinations
    of units (n, K) that are their gradients by least squares, and the variances (n,) of these in units of the noise's."""

    patterns: Tensor
    sources: Tensor
    weights: Tensor
    variances: Tensor

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def left(self) -> Tensor:
        """What takes them out of the units' gradients, (K, K)."""
        return torch.eye(len(self.patterns)).to(self.patterns) - self.patterns @ self.weights


@dataclass(frozen=True)
class _Span:
    """The space of patterns. outside (K, K): projects on what is not in it. rounding (K, r): how much of a pattern it
    puts there, as the length of the product. noise: variance of an entry of the gradients."""

    outside: Tensor
    rounding: Tensor
    noise: float


def read_by_peeling(gradients: Gradients, bins: QueryBins, image_shape: tuple[int, ...], most: int) -> Candidates:
    """At most `most` images, the number that there are, out of the units' gradients.

    Certified images come first, those before others that rounding blurs least; if there are fewer than `most`, what
    else looks like an image of its bin follows, by its bias gradient.
    """
    bins = bins.to(gradients.bias.device)
    seen = _sampled(gradients, bins)
    known = _peeled(seen, bins, most)
    errors = known.variances.sqrt() / (known.weights @ gradients.bias).abs()
    order = errors.argsort(stable=True)
    others, units = _uncertified(seen, known, bins, most - len(known))
    found = gradients.combined(torch.cat([known.weights[order], others]))
    read = torch.cat([known.sources[order], units])
    below, above = bins.bounds(read)
    return Candidates(
        images=found.reshape(-1, *image_shape),
        bins=read,
        deviations=how_far_off(found, below.float(), above.float(), bins.rows_of(read).float()),
        bins_read=bins.units,
    )


def _sampled(gradients: Gradients, bins: QueryBins) -> _Seen:
    places = torch.linspace(0, gradients.inputs - 1, min(SAMPLED, gradients.inputs), dtype=torch.float64).long()
    sampled, values = [], gradients.bias.new_zeros(bins.units, len(bins.rows))
    for part in gradients.parts():
        columns = gradients.columns(part)
        sampled.append(columns[:, places[(places >= part.start) & (places < part.stop)] - part.start])
        values += columns @ bins.rows[:, part].T
    return _Seen(torch.cat([*sampled, values, gradients.bias[:, None]], dim=1), len(bins.rows))


def _peeled(seen: _Seen, bins: QueryBins, most: int) -> _Known:
    rows, entries = seen.rows, seen.entries
    gram = entries @ entries.T
    known = _Known(rows.new_zeros(len(rows), 0), bins.places[:0], rows.new_zeros(0, len(rows)), rows.new_zeros(0))
    span, fresh = _span(gram, known, entries.shape[1], most), True
    while len(known) < most < len(rows):
        patterns, sources = _certified(seen, known, span, bins, most)
        if len(sources):
            patterns, sources = torch.cat([known.patterns, patterns], 1), torch.cat([known.sources, sources])
            known, fresh = _fitted(entries, patterns, sources, bins, span.noise), False
        elif fresh:
            break
        else:
            span, fresh = _span(gram, known, entries.shape[1], most), True
    return known


def _span(gram: Tensor, known: _Known, entries: int, images: int) -> _Span:
    """From the Gram matrix (K, K) of the units' gradients; known patterns are in the space for sure.

    What the gradients have in more dimensions than there are images is rounding, and shows how large that is.
    """
    units, left = len(gram), images - len(known)
    basis = torch.linalg.qr(known.patterns).Q
    rest = torch.eye(units, dtype=gram.dtype, device=gram.device) - basis @ basis.T
    energies, directions = torch.linalg.eigh(rest @ gram @ rest)
    energies, directions = energies.flip(0).clamp_min(0), directions.flip(1)
    noise = float(energies[left : units - len(known)].mean()) if images < units else 0.0
    kept = (energies[:left] > ABOVE_NOISE * noise).nonzero().flatten()
    energies, directions = energies[kept], directions[:, kept]
    outside = rest - (directions * (1 - noise / energies)) @ directions.T
    variance = noise / entries
    return _Span(outside, directions * (variance * (units - images) / energies).clamp_min(0).sqrt(), variance)


def _certified(seen: _Seen, known: _Known, span: _Span, bins: QueryBins, most: int) -> tuple[Tensor, Tensor]:
    """New patterns (K, m) in what is left, and the units (m,) whose bins show them; purest first, each once."""
    _, values, _, units = _plausible(seen, known, bins)
    patterns, outside = _purest(values, units, span, bins)
    explained = AS_EXPECTED * (patterns @ span.rounding).square().sum(dim=1) + EXACT
    passed = (outside <= explained.clamp_max(MOST_OUTSIDE * (1 - most / bins.units))).nonzero().flatten()
    taken = {tuple(pattern) for pattern in known.patterns.T.int().tolist()}
    chosen: list[int] = []
    for place in passed[outside[passed].argsort(stable=True)].tolist():
        pattern = tuple(patterns[place].int().tolist())
        if pattern not in taken and len(taken) < most:
            taken.add(pattern)
            chosen.append(place)
    return patterns[chosen].T, units[chosen]


def _plausible(seen: _Seen, known: _Known, bins: QueryBins) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What bins show of what is left that could be an image of theirs: sampled entries (m, S), what the queries measure
    (m, Q), bias gradients (m,) and the units (m,)."""
    shown = bins.per_bin(seen.rows - known.patterns @ (known.weights @ seen.rows))
    images, values = seen.images(shown), seen.values(shown)
    below, above = bins.bounds(bins.places)
    own = values[bins.places, bins.places // bins.edges.shape[1]]
    missed = torch.maximum(below - own, own - above)
    outside = (images - images.clamp(0, 1)).norm(dim=1) / images.shape[1] ** 0.5
    off = torch.maximum(outside, missed.clamp_min(0) / bins.rows_of(bins.places).abs().sum(dim=1))
    units = ((off <= TOLERANCE) & (missed <= HALF * (above - below))).nonzero().flatten()
    return images[units], values[units], shown[units, -1], units


def _purest(values: Tensor, units: Tensor, span: _Span, bins: QueryBins) -> tuple[Tensor, Tensor]:
    """Patterns (m, K) of images with these values (m, Q) read from the bins of these units, and how much of each is
    outside of the space.

    In its own query an image is in the bin that it was read from; in each of the others in the bin of its value or, as
    rounding moves values, in the neighbor that is nearer, whichever leaves less outside.
    """
    queries, size = bins.edges.shape
    places, row = bins.bins(values), torch.arange(len(units), device=units.device)
    places[row, units // size] = units % size
    patterns = bins.active(places)
    beyond = patterns @ span.outside
    outside = (beyond * patterns).sum(dim=1)
    for query in range(queries):
        inside = places[:, query].clamp_min(0) + query * size
        below, above = bins.bounds(inside)
        down = values[:, query] - below < above - values[:, query]
        toggled = places[:, query] + (~down).int()
        possible = (units // size != query) & (toggled >= 0) & (toggled < size)
        unit, sign = query * size + toggled.clamp(0, size - 1), 1.0 - 2.0 * down.double()
        changed = outside + 2 * sign * beyond[row, unit] + span.outside[unit, unit]
        better = (possible & (changed < outside / 2)).nonzero().flatten()
        patterns[better, unit[better]] += sign[better]
        beyond[better] += sign[better, None] * span.outside[unit[better]]
        outside = torch.where(possible & (changed < outside / 2), changed, outside)
    return patterns, outside


def _fitted(seen: Tensor, patterns: Tensor, sources: Tensor, bins: QueryBins, noise: float) -> _Known:
    """The images' gradients by least squares over all units.

    Bins that still hold other images have unknowns of their own, so that these do not disturb; bins that images were
    read from hold nothing else. The fewer bins hold others, the more units take part, which averages rounding out.
    """
    free = torch.ones(bins.units, dtype=torch.bool, device=seen.device)
    free[sources] = False
    for _ in range(2):
        unknown = torch.cat([patterns, bins.steps[:, free]], dim=1)
        gram = unknown.T @ unknown
        inverse = torch.linalg.inv(gram + RIDGE * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        weights, count = inverse @ unknown.T, len(sources)
        explained = QUIET * noise * seen.shape[1] * inverse.diagonal()[count:]
        held = (weights[count:] @ seen).square().sum(dim=1) > explained
        if bool(held.all()):
            break
        free[free.nonzero().flatten()[~held]] = False
    return _Known(patterns, sources, weights[:count], inverse.diagonal()[:count])


def _uncertified(seen: _Seen, known: _Known, bins: QueryBins, most: int) -> tuple[Tensor, Tensor]:
    """At most `most` images out of what is left, none nearly as another, as combinations of units (m, K), and the units
    (m,) whose bins show them."""
    images, _, strengths, units = _plausible(seen, known, bins)
    others, chosen = seen.images(known.weights @ seen.rows), list[int]()
    for place in strengths.abs().argsort(descending=True, stable=True).tolist():
        if len(chosen) >= most:
            break
        taken = torch.cat([others, images[chosen]])
        if not bool(((taken - images[place]).square().mean(dim=1).sqrt() <= TOLERANCE).any()):
            chosen.append(place)
    return bins.per_bin(known.left)[units[chosen]], units[chosen]

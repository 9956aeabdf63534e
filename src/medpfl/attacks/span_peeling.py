"""Reads bins of several queries by peeling: certified single images are taken out, which frees others they share bins with.

A certificate needs no truth and no pixel grid. The gradients of K units are K combinations of N images, so that the
patterns in which images activate units span all of them: N dimensions out of K. What a bin shows is an image only if
its own pattern, which follows from its values of all queries, lies in that space. A mixture's pattern does not, as long
as the images are fewer than the units, and different enough not to be combinations of each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.attacks.bin_readout import TOLERANCE, Candidates, how_far_off
from medpfl.attacks.query_bins import QueryBins

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


@dataclass(frozen=True)
class _Known:
    """Certified images: patterns (K, n) of ones and zeros, the units (n,) whose bins they were read from, and by least
    squares their gradients (n, D + 1), bias last, with their variances (n,) in units of the noise's."""

    patterns: Tensor
    sources: Tensor
    gradients: Tensor
    variances: Tensor

    def __len__(self) -> int:
        return len(self.sources)


@dataclass(frozen=True)
class _Span:
    """The space of patterns. outside (K, K): projects on what is not in it. rounding (K, r): how much of a pattern it
    puts there, as the length of the product. noise: variance of an entry of the gradients."""

    outside: Tensor
    rounding: Tensor
    noise: float


def read_by_peeling(
    weight: Tensor, bias: Tensor, bins: QueryBins, image_shape: tuple[int, ...], most: int
) -> Candidates:
    """At most `most` images, the number that there are, out of the gradients (K, D) and (K,), in float64.

    Certified images come first, those before others that rounding blurs least; if there are fewer than `most`, what
    else looks like an image of its bin follows, by its bias gradient.
    """
    seen = torch.cat([weight.double(), bias.double()[:, None]], dim=1)
    bins = bins.to(seen.device)
    known = _peeled(seen, bins, most)
    images, errors = _images(known.gradients), known.variances.sqrt() / known.gradients[:, -1].abs()
    order = errors.argsort(stable=True)
    left = seen - known.patterns @ known.gradients
    others, units = _uncertified(left, images, bins, most - len(known))
    found, read = torch.cat([images[order], others]), torch.cat([known.sources[order], units])
    return Candidates(
        images=found.float().reshape(-1, *image_shape),
        bins=read,
        deviations=how_far_off(found, *bins.bounds(read), bins.rows_of(read)),
        bins_read=bins.units,
    )


def _peeled(seen: Tensor, bins: QueryBins, most: int) -> _Known:
    gram = seen @ seen.T
    known = _Known(seen.new_zeros(len(seen), 0), bins.places[:0], seen[:0], seen.new_zeros(0))
    span, fresh = _span(gram, known, seen.shape[1], most), True
    while len(known) < most < len(seen):
        patterns, sources = _certified(seen - known.patterns @ known.gradients, known, span, bins, most)
        if len(sources):
            patterns, sources = torch.cat([known.patterns, patterns], 1), torch.cat([known.sources, sources])
            known, fresh = _fitted(seen, patterns, sources, bins, span.noise), False
        elif fresh:
            break
        else:
            span, fresh = _span(gram, known, seen.shape[1], most), True
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


def _certified(left: Tensor, known: _Known, span: _Span, bins: QueryBins, most: int) -> tuple[Tensor, Tensor]:
    """New patterns (K, m) in what is left, and the units (m,) whose bins show them; purest first, each once."""
    images, units = _plausible(left, bins)
    patterns, outside = _purest(images, units, span, bins)
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


def _plausible(left: Tensor, bins: QueryBins) -> tuple[Tensor, Tensor]:
    """What bins show that could be an image of theirs: images (m, D) and the units (m,)."""
    images = _images(bins.per_bin(left))
    below, above = bins.bounds(bins.places)
    off = how_far_off(images, below, above, bins.rows_of(bins.places))
    values = (images * bins.rows_of(bins.places)).sum(dim=1)
    missed = torch.maximum(below - values, values - above)
    units = ((off <= TOLERANCE) & (missed <= HALF * (above - below))).nonzero().flatten()
    return images[units], units


def _purest(images: Tensor, units: Tensor, span: _Span, bins: QueryBins) -> tuple[Tensor, Tensor]:
    """Patterns (m, K) of images read from the bins of these units, and how much of each is outside of the space.

    In its own query an image is in the bin that it was read from; in each of the others in the bin of its value or, as
    rounding moves values, in the neighbor that is nearer, whichever leaves less outside.
    """
    queries, size = bins.edges.shape
    values = bins.values(images)
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
        solved, count = inverse @ (unknown.T @ seen), len(sources)
        explained = QUIET * noise * seen.shape[1] * inverse.diagonal()[count:]
        held = solved[count:].square().sum(dim=1) > explained
        if bool(held.all()):
            break
        free[free.nonzero().flatten()[~held]] = False
    return _Known(patterns, sources, solved[:count], inverse.diagonal()[:count])


def _uncertified(left: Tensor, known: Tensor, bins: QueryBins, most: int) -> tuple[Tensor, Tensor]:
    """At most `most` images (m, D) out of what is left, none nearly as another, and the units (m,)."""
    images, units = _plausible(left, bins)
    order = bins.per_bin(left)[units, -1].abs().argsort(descending=True, stable=True)
    chosen: list[int] = []
    for place in order.tolist():
        others = torch.cat([known, images[chosen]])
        if len(chosen) >= most:
            break
        if not bool(((others - images[place]).square().mean(dim=1).sqrt() <= TOLERANCE).any()):
            chosen.append(place)
    return images[chosen], units[chosen]


def _images(gradients: Tensor) -> Tensor:
    return gradients[:, :-1] / gradients[:, -1:]

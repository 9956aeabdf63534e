"""Directions in the column space of a weight gradient that are zero in many units: one per image of the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Score = Callable[[Tensor], float]
"""How well r directions (r, r) explain what was observed, at most 1; negative for linearly dependent ones."""

DRAWS_AT_ONCE = 4096
"""Sets of rows whose null vectors are computed together."""

SPARE = 2
"""Beside the drawn units, a direction must be zero in so many more than determine it; by chance it is in none."""

DETERMINED = 0.02
"""Zero rows determine a direction if their second smallest singular value is at least this share of the largest."""

MOST_LEVERAGE = 0.999
"""No zero row may be needed more than this for the rank of all; 1 means that without it the rank is lower."""

KEPT = 6
"""Candidates per image that are kept, those with the most zeros."""

MOST_TRIALS = 400
"""Bases that are scored in all, because every one runs the model."""

SAME = 1e-6
"""One minus the absolute cosine below which two directions are one."""

NEAR = 1e-4
"""The same for a drawn vector, which rounding has moved, and a known direction: it is not looked at again."""


def sparse_directions(
    left: Tensor, draws: int, zero: float, generator: torch.Generator, score: Score, enough: float
) -> tuple[Tensor, int]:
    """Vectors q for which left @ q is zero in as many units as can be: left (m, r) -> ((k, r) unit rows, draws used).

    Each draw takes r - 1 random rows and the vector that is orthogonal to them. If an image is inactive in all drawn
    units, that vector is its direction, and then it is zero in all other units in which the image is inactive. It is
    a candidate if these others, the drawn ones left out, determine it; a mixture of images that share inactive units
    is not determined by them. Of all candidates those with the most zeros are taken that are linearly independent;
    where their `score` is not `enough`, others are tried in their places (a few classes make some mixtures sparse too).
    `zero`: entries below this share of the row's norm count as zero. Ends when r directions score enough.
    """
    rank = left.shape[1]
    norms = left.norm(dim=1)
    rows = left[norms > zero * norms.max()]
    rows = rows / rows.norm(dim=1, keepdim=True)
    if rank == 1:
        return left.new_ones(1, 1), 0
    candidates, counts = left.new_zeros(0, rank), torch.zeros(0, dtype=torch.int64)
    found, value, used, trials = candidates, -1.0, 0, 0
    while used < draws and len(rows) >= rank + SPARE and value < enough:
        number = min(DRAWS_AT_ONCE, draws - used)
        used += number
        chosen = torch.rand((number, len(rows)), generator=generator).topk(rank - 1, dim=1).indices
        vectors = torch.linalg.qr(rows[chosen].transpose(1, 2), mode="complete").Q[:, :, -1]
        zeros = (rows @ vectors.T).abs() <= zero
        zeros.scatter_(0, chosen.T, False)
        before = candidates
        for place in torch.nonzero(zeros.sum(dim=0) >= rank - 1 + SPARE).flatten().tolist():
            if bool(((candidates @ vectors[place]).abs() > 1.0 - NEAR).any()):
                continue
            direction = _refined(rows, zeros[:, place])
            if direction is not None and bool(((candidates @ direction).abs() < 1.0 - SAME).all()):
                candidates = torch.cat([candidates, direction[None]])
                counts = torch.cat([counts, ((rows @ direction).abs() <= zero).sum()[None]])
        order = counts.argsort(descending=True, stable=True)[: KEPT * rank]
        candidates, counts = candidates[order], counts[order]
        if trials < MOST_TRIALS and not torch.equal(candidates, before):
            found, value, spent = _best_basis(candidates, score, enough, MOST_TRIALS - trials)
            trials += spent
    return found, used


def _best_basis(candidates: Tensor, score: Score, enough: float, trials: int) -> tuple[Tensor, float, int]:
    """The sparsest independent candidates, then with others in their places as long as the score rises.

    The other two values are their score, and how many bases were scored, at most `trials`.
    """
    found = _independent(candidates)
    if len(found) < candidates.shape[1]:
        return found, -1.0, 0
    value, spent = score(found), 1
    for other in candidates:
        for place in range(len(found)):
            if value >= enough or spent >= trials:
                return found, value, spent
            tried = found.clone()
            tried[place] = other
            spent += 1
            if (other_value := score(tried)) > value:
                found, value = tried, other_value
    return found, value, spent


def _refined(rows: Tensor, zeros: Tensor) -> Tensor | None:
    """The direction that is best orthogonal to the rows where it was found zero; None if they leave it open.

    They do where one row alone (leverage 1) makes their rank: then the others are those of a mixture.
    """
    open_ranks = rows.shape[1] - 1
    outer, values, vectors = torch.linalg.svd(rows[zeros], full_matrices=False)
    if len(values) < open_ranks or float(values[open_ranks - 1]) < DETERMINED * float(values[0]):
        return None
    if float(outer[:, :open_ranks].square().sum(dim=1).max()) > MOST_LEVERAGE:
        return None
    direction: Tensor = vectors[-1]
    return direction


def _independent(candidates: Tensor) -> Tensor:
    """The first candidates (k, r) of which none is a combination of those before it."""
    chosen: list[int] = []
    basis = candidates.new_zeros(0, candidates.shape[1])
    for place, direction in enumerate(candidates):
        rest = direction - basis.T @ (basis @ direction)
        if float(rest.norm()) > SAME**0.5:
            chosen.append(place)
            basis = torch.cat([basis, (rest / rest.norm())[None]])
    return candidates[chosen]


def assemble(left: Tensor, right: Tensor, directions: Tensor, total: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """Images' parts D (m, r) and inputs X (r, n) with left @ right = D @ X and D @ 1 = total (m,).

    directions: (r, r) rows. The third value is the share of `total` that no scaling of the directions explains. None
    if the directions are linearly dependent.
    """
    basis = directions.T
    if int(torch.linalg.matrix_rank(basis, rtol=1e-8)) < len(basis):
        return None
    parts = left @ basis
    scale = torch.linalg.lstsq(parts, total[:, None], driver="gelsd").solution[:, 0]
    unexplained = float((parts @ scale - total).square().sum() / total.square().sum())
    if not bool((scale.abs() > 0).all()):
        return None
    return parts * scale, torch.linalg.solve(basis * scale, right), unexplained

"""Layers that see images and answer nearly all of them one way, though the signs of their rows are freshly drawn.

A row that was drawn at random answers to an image with either sign alike: half of the units are on. Training may switch
most of them off, in nets whose units die above all, but by adding multiples of images to rows, which turns signs of
entries as well. Rows whose signs answer to images as freshly drawn ones do, and whose sizes or biases answer one way,
were made: traps, each on for single images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medpfl.guards.layer_views import LayerView
from medpfl.guards.vetting.base import Evidence, Measured, behavior, check, worst
from medpfl.guards.vetting.layers import first_trained
from medpfl.guards.vetting.watch import Watched

TRAPS = "Boenisch et al.: When the Curious Abandon Honesty, EuroS&P 2023"

ERRORS = 3.5
"""Mean and variance of what freshly drawn signs answer lie within so many standard errors of 0 and 1."""

FEWEST_UNITS = 32
"""Of fewer units chance alone shifts the mean too far."""

MOST = 1e6
"""Larger shifts are as good as this one."""

THRESHOLD = 1.1
"""Between the largest score of dense nets with 64 to 1024 units, untrained to dying (0.85), and the smallest of traps
for 16 images (1.4). Traps for 8 images lie around it."""

LIMITS = (
    "rows that are shifted rather than scaled, traps among the rows of a trained net and those that many images switch "
    "on are not told from honest layers"
)


@behavior(
    "one_sided_units",
    means="crafted",
    threshold=THRESHOLD,
    summary="a layer that sees images, whose units answer one way by weights of freshly drawn signs: traps",
    paper=TRAPS,
    limits=LIMITS,
)
def one_sided_units(watched: Watched) -> Measured | None:
    """|mean| over deviation of the units' answers to the mean image, as far as the signs of their rows are fresh."""
    seen = {finding.layer for finding in watched.test.layers if finding.sees == "image"}
    views = [view for view in watched.wide if view.path in seen and view.units >= FEWEST_UNITS]
    return worst([_at_work(watched, view) for view in views])


def _at_work(watched: Watched, view: LayerView) -> Measured:
    rows = watched.rows(view)
    lengths = torch.linalg.vector_norm(rows, dim=1).double()
    answers = watched.answers(view).double().mean(dim=0) / lengths.clamp_min(1e-300)
    kept = lengths > 0
    return one_sided(rows[kept], view.mean(), answers[kept], view.path)


@check(
    "one_sided_rows",
    about="structure",
    means="crafted",
    threshold=THRESHOLD,
    summary="a first dense layer whose rows sum to one sign by weights of freshly drawn signs: traps",
    paper=TRAPS,
    limits=f"{LIMITS}; thresholds in place of smaller positive weights show on images only",
)
def one_sided_rows(evidence: Evidence) -> Measured | None:
    """The same for an image of ones and without biases, in the first dense layer."""
    first = first_trained(evidence.tensors, evidence.layers)
    if first is None or not first.dense or first.bias is None or first.weight.shape[0] < FEWEST_UNITS:
        return None
    rows = first.weight.float()
    rows = rows[rows.any(dim=1)]
    answers = rows.sum(dim=1).double() / torch.linalg.vector_norm(rows, dim=1).double()
    return one_sided(rows, rows.new_ones(rows.shape[1]), answers, first.name)


def one_sided(rows: Tensor, mean: Tensor, answers: Tensor, where: str) -> Measured:
    """|mean| / deviation of `answers` (units,), less where signs of `rows` (units, inputs) are not freshly drawn.

    What signs answer to `mean` (inputs,), over its length, has mean 0 and variance 1 where they are. How many times
    `ERRORS` standard errors the mean is off, or the variance above, is what the score is divided by, squared.

    >>> drawn = torch.randn(256, 400, generator=torch.Generator().manual_seed(0))
    >>> traps, shifted = torch.where(drawn > 0, 0.8 * drawn, drawn), drawn - 0.1
    >>> [round(one_sided(rows, torch.ones(400), rows.sum(1), "").score, 1) for rows in (drawn, traps, shifted)]
    [0.1, 1.9, 0.0]
    """
    units = len(answers)
    if units < FEWEST_UNITS or not bool(mean.any()):
        return Measured(0.0, where, f"only {units} rows are not zero, or all images are black")
    reached = ((rows != 0).to(mean.dtype) @ mean.square()).clamp_min(1e-30).sqrt()
    signs = ((rows.sign() @ mean) / reached).double()
    off = max(
        float(signs.mean().abs()) * units**0.5 / ERRORS,
        (float(signs.var()) - 1.0) * (units / 2) ** 0.5 / ERRORS,
    )
    shift = min(MOST, float(answers.mean().abs() / answers.std().clamp_min(1e-300)))
    one_way = float(torch.maximum((answers < 0).sum(), (answers > 0).sum())) / units
    seen = f"{one_way:.0%} of {units} units answer one way, {shift:.2g} deviations from none"
    return Measured(shift / max(1.0, off) ** 2, where, f"{seen}, and the signs of their weights are freshly drawn")

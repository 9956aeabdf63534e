"""Rows of dense layers (and of convolutions, whose kernels are rows too) that sort images instead of describing them.

All measures stay as they are when units are permuted or scaled by positive factors.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from medpfl.guards.vetting.base import Evidence, Measured, check, worst
from medpfl.guards.vetting.layers import FEWEST, Weighted, sampled_rows

SAMPLED = 256
"""Rows or columns of a layer that are compared with each other."""

FEWEST_ENTRIES = 4
"""Rows with fewer entries that are not zero, as heavy pruning leaves them, are not compared: they are alike by chance."""

SAME_DIRECTION = 0.998
"""Cosine from which two rows count as multiples of one another (noise of 6% of a row's length)."""

SAME_THRESHOLD = 1e-3
"""Relative difference up to which two units have the same threshold."""


@check(
    "proportional_rows",
    about="structure",
    means="crafted",
    threshold=0.03,
    summary="units that look into one direction with different thresholds: bins, which tell images apart",
    paper="Fowl et al.: Robbing the Fed, ICLR 2022; Shi et al.: Scale-MIA, NDSS 2025, and MedLeak",
    limits="noise of more than 6% of a row hides it, and so do inputs that are always zero",
)
def proportional_rows(evidence: Evidence) -> Measured | None:
    """The share of units whose row is a multiple of another one's while bias over row norm differs."""
    return worst([_proportional(layer) for layer in _wide(evidence) if layer.bias is not None])


def _proportional(layer: Weighted) -> Measured:
    assert layer.bias is not None  # the caller chooses such layers
    matrix = layer.weight.flatten(1)
    enough = _count(matrix != 0) >= FEWEST_ENTRIES
    matrix = matrix if bool(enough.all()) else torch.where(enough[:, None], matrix, 0.0)
    rows, places = sampled_rows(matrix, SAMPLED)
    thresholds = layer.bias[places].double() / torch.linalg.vector_norm(matrix[places].double(), dim=1)
    cosines = rows @ rows.T
    alike = cosines.abs() >= SAME_DIRECTION
    signed = thresholds[None] * cosines.sign()
    apart = (thresholds[:, None] - signed).abs() > SAME_THRESHOLD * (thresholds[:, None].abs() + signed.abs())
    share = float((alike & apart).any(dim=1).double().mean()) if len(rows) else 0.0
    return Measured(
        share,
        layer.name,
        f"{share:.0%} of {len(rows)} units look into one direction and differ in their thresholds",
    )


@check(
    "proportional_columns",
    about="structure",
    means="crafted",
    threshold=0.1,
    summary="a dense layer whose columns are multiples of one another: every unit before it gets the same error",
    paper="Fowl et al.: Robbing the Fed, ICLR 2022; Shi et al.: Scale-MIA, NDSS 2025, and MedLeak",
    limits="noise of more than 6% of a column hides it",
)
def proportional_columns(evidence: Evidence) -> Measured | None:
    """The share of inputs whose column is a multiple of another one's."""
    return worst([_columns(layer) for layer in _wide(evidence) if layer.dense])


def _columns(layer: Weighted) -> Measured:
    columns, _ = sampled_rows(layer.weight.T, SAMPLED)
    alike = (columns @ columns.T).abs() >= SAME_DIRECTION
    share = float((alike.sum(dim=1) > 1).double().mean()) if len(columns) else 0.0
    return Measured(share, layer.name, f"{share:.0%} of {len(columns)} columns are multiples of one another")


@check(
    "low_rank",
    about="structure",
    means="crafted",
    threshold=0.8,
    summary="a dense layer whose rows lie in two directions, but for noise",
    limits="noise of half of a row's length hides it; so do several queries (proportional_rows sees those)",
)
def low_rank(evidence: Evidence) -> Measured | None:
    """The share of two directions in the squared length of the rows, each row counted with length 1."""
    return worst([_rank(layer) for layer in _wide(evidence) if layer.dense])


def _rank(layer: Weighted) -> Measured:
    rows, _ = sampled_rows(layer.weight, SAMPLED)
    if len(rows) < FEWEST:
        return Measured(0.0, layer.name, f"only {len(rows)} rows are not zero")
    spectrum = torch.linalg.eigvalsh((rows @ rows.T).double())
    share = float(spectrum[-2:].sum() / spectrum.sum())
    return Measured(share, layer.name, f"two directions make up {share:.1%} of the rows")


@check(
    "large_thresholds",
    about="structure",
    means="crafted",
    threshold=4.0,
    summary="biases that are large against their rows, as thresholds on brightness are",
    paper="Fowl et al.: Robbing the Fed, ICLR 2022",
    limits="dark images need small thresholds; inputs that are always zero make rows long",
)
def large_thresholds(evidence: Evidence) -> Measured | None:
    """The median of bias over row norm."""
    return worst([_thresholds(layer) for layer in _wide(evidence) if layer.bias is not None])


def _thresholds(layer: Weighted) -> Measured:
    assert layer.bias is not None  # the caller chooses such layers
    norms = torch.linalg.vector_norm(layer.weight.flatten(1).double(), dim=1)
    ratios = (layer.bias.double().abs() / norms)[norms > 0]
    median = float(ratios.median()) if len(ratios) else 0.0
    return Measured(median, layer.name, f"biases are {median:.2g} times as large as the rows they belong to")


@check(
    "half_negative_rows",
    about="structure",
    means="crafted",
    threshold=0.5,
    summary="rows with exactly as many negative as positive entries, as trap weights have",
    paper="Boenisch et al.: When the Curious Abandon Honesty, EuroS&P 2023",
    limits="rows with a random number of negative entries are not told from honest ones",
)
def half_negative_rows(evidence: Evidence) -> Measured | None:
    """The share of rows with exactly half of their entries below zero, beyond the share that chance gives."""
    return worst([_half_negative(layer.weight.flatten(1), layer.name) for layer in _wide(evidence)])


def _half_negative(matrix: Tensor, name: str) -> Measured:
    negative, positive = _count(matrix < 0), _count(matrix > 0)
    entries = (negative + positive)[negative + positive >= FEWEST]
    if len(entries) < FEWEST:
        return Measured(0.0, name, f"only {len(entries)} rows have {FEWEST} entries that are not zero")
    exact = ((negative - positive).abs() <= 1) & (negative + positive >= FEWEST)
    odd = (entries % 2).double()
    chance = float(((1.0 + odd) * (2.0 / (torch.pi * entries.double())).sqrt()).mean())
    share = int(exact.sum()) / len(entries)
    seen = f"{share:.0%} of {len(entries)} rows have as many negative as positive entries"
    return Measured(max(0.0, share - chance), name, seen)


def _count(chosen: Tensor) -> Tensor:
    """How many entries of each row are chosen, (units,); bytes are summed faster than booleans."""
    return chosen.view(torch.uint8).sum(dim=1, dtype=torch.int64)


def _wide(evidence: Evidence) -> Iterable[Weighted]:
    """Layers without the head that have enough units and inputs to say something."""
    for layer in evidence.layers.all:
        units, inputs = layer.weight.shape[0], layer.weight[0].numel()
        if layer is not evidence.layers.head and min(units, inputs) >= FEWEST:
            yield layer

"""Reads a leakage module's gradient: one query in closed form, several by peeling."""

from __future__ import annotations

from torch import Tensor

from medpfl.attacks.bin_readout import Candidates, read_single_bins
from medpfl.attacks.query_bins import QueryBins
from medpfl.attacks.span_peeling import read_by_peeling


def read_module(
    weight: Tensor, bias: Tensor, bins: QueryBins, image_shape: tuple[int, ...], most: int, floor: float
) -> Candidates:
    """At most `most` images out of the gradients (K, D) and (K,) of the module's first layer; see the two readers."""
    if len(bins.rows) == 1:
        return read_singles(weight, bias, bins, image_shape, most, floor)
    return read_by_peeling(weight, bias, bins, image_shape, most)


def read_singles(
    weight: Tensor, bias: Tensor, bins: QueryBins, image_shape: tuple[int, ...], most: int, floor: float
) -> Candidates:
    """Images that are alone in a bin, without peeling: at most `most` for each query, the same maybe in several."""
    bins = bins.to(bias.device)
    return read_single_bins(
        bins.per_bin(weight.double()),
        bins.per_bin(bias.double()),
        *bins.bounds(bins.places),
        image_shape,
        most * len(bins.rows),
        floor,
        bins.rows_of(bins.places),
    )

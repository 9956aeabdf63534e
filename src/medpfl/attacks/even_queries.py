"""Which of many linear queries spreads images most evenly over bins that were made from other images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from medpfl.attacks.brightness_bins import bin_counts, smoothed_edges
from medpfl.attacks.linear_queries import DCT_MODE, below_all, color_query, linear_query, query_values, smooth_query

DRAWN = 4
"""Candidates of each random kind."""

MODES = (DCT_MODE // 2, DCT_MODE, 3 * DCT_MODE // 2)

SPLITS = 8
"""Random halvings of the images that each candidate is judged by."""

MOST_IMAGES = 4096
"""Images that judging takes at most."""


def evenest(images: Tensor, bins: int, generator: torch.Generator) -> Tensor:
    """The query (D,) under which images (N, C, *spatial) share so many bins least: mean value, color, pattern or cosine.

    The mean values of a collection's images may lie in clumps where other measures of the same images do not.
    """
    images = images[:MOST_IMAGES]
    queries = list(_candidates(tuple(images.shape[1:]), generator))
    halves = [torch.randperm(len(images), generator=generator).chunk(2) for _ in range(SPLITS)]

    def shared(query: Tensor) -> float:
        values = query_values(images, query).cpu()
        pairs = [pair for half in halves for pair in (half, half[::-1])]
        return sum(crowding(values[one], values[other], bins, below_all(query)) for one, other in pairs)

    return min(queries, key=shared)


def crowding(known: Tensor, others: Tensor, bins: int, first: float) -> float:
    """How probably two of the others share a bin of equal mass for the known values; 1 / bins where all is even.

    >>> crowding(torch.tensor([0.0, 1.0]), torch.tensor([0.1, 0.2, 0.9]), 2, -1.0)
    0.3333333333333333
    """
    counts = bin_counts(others, smoothed_edges(known, bins, first)).double()
    number = max(2, len(others))
    return float((counts * (counts - 1)).sum()) / (number * (number - 1))


def _candidates(shape: tuple[int, ...], generator: torch.Generator) -> Iterator[Tensor]:
    yield linear_query("mean", shape, generator)
    if shape[0] > 1:
        yield from (color_query(shape, one) for one in torch.eye(shape[0]))
        yield from (color_query(shape, torch.randn(shape[0], generator=generator)) for _ in range(DRAWN))
    for mode in MODES:
        yield linear_query("dct", shape, generator, mode=mode)
    for _ in range(DRAWN):
        yield smooth_query(shape, generator)
        yield linear_query("random", shape, generator)

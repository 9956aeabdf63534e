"""Bins of several linear queries: which images are where, and how many of them peeling can tell apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from medpfl.attacks.bin_readout import between_neighbors
from medpfl.attacks.brightness_bins import empirical_edges, gaussian_edges, kernel_width, smoothed_edges
from medpfl.attacks.even_queries import evenest
from medpfl.attacks.linear_queries import DCT_MODE, below_all, linear_query, query_values, smooth_query

Pattern = Literal["smooth", "even", "random", "dct"]
Quantiles = Literal["smoothed", "empirical", "gaussian"]

MOST_QUERIES = 6
"""Queries that are tried at most: with more the bins of each become so few that fewer images can be peeled."""

ENOUGH = 512
"""Auxiliary images that choosing the number of queries takes."""

DRAWS = 16
"""Rounds that are drawn for each number of queries."""

AS_MANY = 0.002
"""Shares of images that differ by no more count as equal, and fewer queries are taken."""


@dataclass(frozen=True)
class QueryBins:
    """Q linear queries, each with B bins of its own. Unit q * B + k is active for images that query q puts above edge k.

    rows: (Q, D) float64, what each query weighs an image's values with. edges: (Q, B) float64, rising.
    """

    rows: Tensor
    edges: Tensor

    @property
    def units(self) -> int:
        """Bins of all queries together, K = Q * B."""
        return self.edges.numel()

    @cached_property
    def places(self) -> Tensor:
        """All units, (K,)."""
        return torch.arange(self.units, device=self.edges.device)

    @cached_property
    def steps(self) -> Tensor:
        """Which units are active for images in the bin of each unit, of its own query only: (K, K), columns are bins."""
        queries, size = self.edges.shape
        ones = torch.ones((size, size), dtype=torch.float64, device=self.edges.device).triu()
        return torch.kron(torch.eye(queries, dtype=torch.float64, device=ones.device), ones)

    def times(self, count: int) -> QueryBins:
        """The same bins for so many blocks of units, one after the other."""
        return QueryBins(self.rows.repeat(count, 1), self.edges.repeat(count, 1))

    def to(self, device: torch.device) -> QueryBins:
        """The same there."""
        return QueryBins(self.rows.to(device), self.edges.to(device))

    def rows_of(self, units: Tensor) -> Tensor:
        """The weights (M, D) of these units' queries."""
        return self.rows[units // self.edges.shape[1]]

    def last(self, units: Tensor) -> Tensor:
        """Which of these units (M,) have no unit of the same query after them."""
        return (units + 1) % self.edges.shape[1] == 0

    def bounds(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """Where the bins of these units (M,) begin and end."""
        above = torch.cat([self.edges[:, 1:], torch.full_like(self.edges[:, :1], torch.inf)], dim=1)
        return self.edges.flatten()[units], above.flatten()[units]

    def values(self, images: Tensor) -> Tensor:
        """What the queries measure of images (N, ...), (N, Q)."""
        return query_values(images, self.rows.T)

    def bins(self, values: Tensor) -> Tensor:
        """The bins of values (N, Q); -1 below the first edge."""
        return (torch.searchsorted(self.edges, values.T.contiguous()) - 1).T.contiguous()

    def per_bin(self, gradients: Tensor) -> Tensor:
        """What the images of each unit's bin put into the units' gradients (K, ...)."""
        return torch.cat([between_neighbors(part) for part in gradients.chunk(len(self.edges))])

    def active(self, bins: Tensor) -> Tensor:
        """Which units are active for images in these bins (N, Q), 1.0 or 0.0, (N, K)."""
        places = torch.arange(self.edges.shape[1], device=bins.device)
        return (places <= bins[:, :, None]).flatten(1).double()

    def counts(self, images: Tensor) -> Tensor:
        """How many of the images are in each bin of each query, (K,)."""
        bins = self.bins(self.values(images))
        places = bins + torch.arange(len(self.rows), device=bins.device) * self.edges.shape[1]
        return torch.bincount(places[bins >= 0], minlength=self.units)

    def alone(self, images: Tensor) -> Tensor:
        """Which images (N,) are the only ones in their bin, in one query at least."""
        return _alone(self.bins(self.values(images)))


def query_bins(
    pattern: Pattern,
    count: int,
    units: int,
    images: Tensor,
    generator: torch.Generator,
    quantiles: Quantiles = "smoothed",
) -> QueryBins:
    """`count` queries that share `units` units, with bins from the auxiliary `images` (M, C, *spatial).

    Every query is made uncorrelated on these images with those before it, so that images that share a bin in one
    rarely share one in another, and gets the length of the mean value's weights. quantiles: of the values' smoothed
    distribution, of the values themselves, or of a normal distribution.
    """
    size = units // count
    rows = query_rows(pattern, count, images, generator, size)
    columns = query_values(images, rows.T).T
    if quantiles == "gaussian":
        found = [gaussian_edges(values, size) for values in columns]
    else:
        edges = smoothed_edges if quantiles == "smoothed" else empirical_edges
        found = [edges(values, size, below_all(row)) for values, row in zip(columns, rows, strict=True)]
    return QueryBins(rows, torch.stack(found).to(rows.device))


def query_rows(pattern: Pattern, count: int, images: Tensor, generator: torch.Generator, bins: int) -> Tensor:
    """Weights (count, D): mean value and smooth random patterns (`even`: in place of the mean what spreads the images
    most evenly over so many bins); white random weights; or cosines of rising frequency.
    """
    flat, shape = images.double().flatten(1), tuple(images.shape[1:])
    centered = flat - flat.mean(dim=0)
    rows = flat.new_zeros(0, flat.shape[1])
    for place in range(count):
        even = pattern == "even" and place == 0
        row = evenest(images, bins, generator) if even else _pattern(pattern, place, shape, generator)
        row = row.to(flat.device)
        known = centered @ rows.T
        row = row - torch.linalg.pinv(known) @ (centered @ row) @ rows
        rows = torch.cat([rows, (row / (row.norm() * len(row) ** 0.5))[None]])
    return rows


def peelable(bins: Tensor) -> Tensor:
    """Which images in these bins (N, Q) can be told apart by taking out, in turn, those that are alone in some bin.

    Two images that share a bin of one query, one of which is alone in the other query:

    >>> peelable(torch.tensor([[0, 0], [0, 1], [2, 1]])).tolist()
    [True, True, True]
    >>> peelable(torch.tensor([[0, 0], [0, 0], [2, 1]])).tolist()
    [False, False, True]
    """
    left = torch.ones(len(bins), dtype=torch.bool, device=bins.device)
    while len(free := left.nonzero().flatten()[_alone(bins[left])]):
        left[free] = False
    return ~left


def peelable_shares(
    bins_for: Callable[[int, Tensor], QueryBins], units: int, images: Tensor, number: int, generator: torch.Generator
) -> dict[int, float]:
    """Which share of so many images can be peeled with 1, 2, ... queries, in rounds drawn from auxiliary `images`.

    bins_for: bins of so many queries, from such images. units: that all queries share. Images are drawn with replacement, and each of their values is moved at
    random by the width of the kernels that smooth the bins, so that few auxiliary images stand for many others.
    """
    shares = {}
    images = images[torch.randperm(len(images), generator=generator)[:ENOUGH].to(images.device)].cpu()
    for count in range(1, min(MOST_QUERIES, units // 2) + 1):
        bins = bins_for(count, images)
        values = bins.values(images)
        widths = torch.tensor([kernel_width(column) for column in values.T], dtype=torch.float64)
        drawn = values[torch.randint(len(values), (DRAWS, number), generator=generator)]
        drawn = drawn + widths * torch.randn(drawn.shape, dtype=torch.float64, generator=generator)
        places = bins.bins(drawn.flatten(0, 1)).reshape(drawn.shape)
        shares[count] = float(torch.stack([peelable(one) for one in places]).double().mean())
    return shares


def fewest_of_best(shares: dict[int, float]) -> int:
    """The number of queries with the largest share, or fewer that are as good.

    >>> fewest_of_best({1: 0.6, 2: 0.98, 3: 1.0, 4: 1.0})
    3
    """
    return min(count for count, share in shares.items() if share >= max(shares.values()) - AS_MANY)


def _alone(bins: Tensor) -> Tensor:
    """Which images (N, Q) are the only ones in their bin in some query; those below the first edge are in none."""
    found = torch.zeros(len(bins), dtype=torch.bool, device=bins.device)
    for column in bins.T:
        counts = torch.bincount(column[column >= 0], minlength=1)
        found |= (column >= 0) & (counts[column.clamp_min(0)] == 1)
    return found


def _pattern(pattern: Pattern, place: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if pattern == "random":
        return linear_query("random", shape, generator)
    if pattern == "dct":
        return linear_query("dct", shape, generator, mode=DCT_MODE + place)
    if place == 0:
        return linear_query("mean", shape, generator)
    return smooth_query(shape, generator)

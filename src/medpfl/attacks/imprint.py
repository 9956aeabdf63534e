"""The imprint block of Robbing the Fed: units that are active by where a linear query of the image lies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from medpfl.attacks.bin_readout import Candidates, between_neighbors, read_single_bins
from medpfl.attacks.front import BIAS, SECOND_BIAS, SECOND_WEIGHT, WEIGHT, dense_in_front
from medpfl.attacks.linear_queries import QueryName
from medpfl.core.domain import GlobalModel, Tensors

AS_AN_IMAGE = 2.0
"""An empty bin that shows more than one over this of what full ones do holds an image that rounding moved there."""

WIDTH = 1e-9
"""Bins are taken to be no narrower, so that equal quantiles do not divide by zero."""


@dataclass(frozen=True)
class Imprint:
    """Two dense layers whose units divide the values of a linear query into bins.

    Cumulative: unit k is relu(scale * (value - edge_k)), active for all images above edge k. Sparse: it is
    scale * (value - edge_k) / width_k cut off at 0 and at scale, which has a slope inside bin k only. Columns of the
    second layer are equal and divided by `scale`, so the output does not depend on it.

    edges: (K + 1,) float64, rising; the last one bounds the last bin from above. query: (D,) float64. column: (D,), of
    the second layer. offset: (D,), its biases. residual: the image itself is added to the output.
    """

    edges: Tensor
    query: Tensor
    column: Tensor
    offset: Tensor
    scale: float
    sparse: bool
    residual: bool

    def in_front_of(self, model: GlobalModel) -> GlobalModel:
        """`model` with the block in front of it; the names of the model's own tensors get the prefix `body.`."""
        below = self.edges[:-1]
        slopes = self.scale * (1 / self.edges.diff().clamp_min(WIDTH) if self.sparse else torch.ones_like(below))
        tensors = {
            WEIGHT: slopes[:, None] * self.query,
            BIAS: -slopes * below,
            SECOND_WEIGHT: (self.column / self.scale)[:, None].expand(-1, len(below)),
            SECOND_BIAS: self.offset,
        }
        device = model.device
        return dense_in_front(
            model,
            {name: tensor.float().contiguous().to(device) for name, tensor in tensors.items()},
            activation=partial(nn.functional.hardtanh, min_val=0.0, max_val=self.scale) if self.sparse else torch.relu,
            residual=self.residual,
        )


def bin_gradients(gradient: Tensors, sparse: bool) -> tuple[Tensor, Tensor]:
    """What each bin's images alone add to weights (K, D) and biases (K,), from the gradient of the first layer."""
    weight, bias = gradient[WEIGHT].double(), gradient[BIAS].double()
    return (weight, bias) if sparse else (between_neighbors(weight), between_neighbors(bias))


def read_imprint(
    gradient: Tensors, secret: Tensors, sparse: bool, image_shape: tuple[int, ...], most: int, floor: float
) -> Candidates:
    """At most `most` images out of the first layer's gradient; `secret` holds the block's edges and query."""
    below, above = secret["edges"][:-1], secret["edges"][1:]
    return read_single_bins(*bin_gradients(gradient, sparse), below, above, image_shape, most, floor, secret["query"])


def floor_of(steps: Tensor, counts: Tensor) -> float:
    """The size below which what a bin shows (K,) is rounding: the largest that bins without images (counts, (K,)) show.

    What is nearly as large as an image is one: rounding moves images that lie on an edge to the next bin.

    >>> floor_of(torch.tensor([1.0, 0.9, 1e-6, 0.8]), torch.tensor([1, 1, 0, 0]))
    9.999999974752427e-07
    """
    empty, full = steps[counts == 0].abs(), steps[counts > 0].abs()
    rounding = empty[empty * AS_AN_IMAGE < full.median()] if len(full) else empty
    return float(rounding.max()) if len(rounding) else 0.0


def fitted_edges(values: Tensor, levels: Tensor, name: QueryName) -> Tensor:
    """Quantiles of the distribution that Fowl et al. take with the values' mean and deviation: Laplace for cosines.

    >>> fitted_edges(torch.tensor([0.0, 2.0]), torch.tensor([0.5]), "dct").tolist()
    [1.0]
    """
    values, levels = values.double().cpu(), levels.double()
    if name == "dct":
        standard = -(levels - 0.5).sign() * (1 - 2 * (levels - 0.5).abs()).log() / math.sqrt(2)
    else:
        standard = torch.special.ndtri(levels)
    edges: Tensor = values.mean() + values.std().clamp_min(1e-6) * standard
    return edges

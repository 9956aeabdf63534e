"""Layers as the tensors of a checkpoint show them, without any code: dense layers, convolutions, their biases."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from torch import Tensor

from medpfl.core.domain import Tensors

FEWEST = 16
"""Layers with fewer units or inputs are not looked at: short rows are alike by chance."""


@dataclass(frozen=True)
class Weighted:
    """A weight with its bias, if it has one. Dense: (units, inputs). Convolution: (channels, inputs, *kernel)."""

    name: str
    weight: Tensor
    bias: Tensor | None

    @property
    def dense(self) -> bool:
        """Whether it is a dense layer."""
        return self.weight.ndim == 2


@dataclass(frozen=True)
class Layers:
    """Dense layers and convolutions in the order of the tensors, which is usually that of their use."""

    all: tuple[Weighted, ...]

    @property
    def dense(self) -> tuple[Weighted, ...]:
        """The dense ones."""
        return tuple(layer for layer in self.all if layer.dense)

    @property
    def convolutions(self) -> tuple[Weighted, ...]:
        """The convolutions."""
        return tuple(layer for layer in self.all if not layer.dense)

    @property
    def head(self) -> Weighted | None:
        """The last dense layer, if no convolution comes after it: what gives the class scores of a classifier."""
        return self.all[-1] if self.all and self.all[-1].dense else None

    @property
    def hidden(self) -> tuple[Weighted, ...]:
        """The dense layers without the head."""
        return tuple(layer for layer in self.dense if layer is not self.head)


def layers_of(tensors: Tensors) -> Layers:
    """Every floating tensor of 2, 4 or 5 dimensions whose name ends in `weight`, or any of them if names say nothing.

    Its bias is the tensor of that name with `bias` for `weight`, else the next tensor, if it has one entry per unit.

    >>> found = layers_of({"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3), "token": torch.zeros(1, 1, 4)})
    >>> [(layer.name, layer.bias is not None) for layer in found.all]
    [('fc', True)]
    """
    named = any(name.endswith("weight") for name in tensors)
    following = {name: after for (name, _), (_, after) in pairwise(tensors.items())}
    found = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.ndim not in (2, 4, 5) or tensor.numel() == 0:
            continue
        if named and not name.endswith("weight"):
            continue
        stem = name.removesuffix("weight")
        bias = tensors.get(f"{stem}bias") if named else following.get(name)
        fits = bias is not None and bias.shape == tensor.shape[:1]
        found.append(Weighted(stem.removesuffix(".") or name, tensor, bias if fits else None))
    return Layers(tuple(found))


def sampled_rows(matrix: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """At most `most` of the rows that are not zero, (rows, columns) of length 1 in float32, and their places (rows,).

    Which ones is drawn with a fixed seed, so that the same model always gives the same rows.
    """
    places = (matrix != 0).any(dim=1).nonzero().flatten()
    if len(places) > most:
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
        places = places[order[:most]].sort().values
    rows = matrix[places].double()
    return (rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)).float(), places


def first_trained(tensors: Tensors, layers: Layers) -> Weighted | None:
    """The layer with the first tensor of two or more dimensions; None if such a tensor belongs to no layer."""
    first = next((tensor for tensor in tensors.values() if tensor.is_floating_point() and tensor.ndim >= 2), None)
    return next((layer for layer in chain(layers.all) if layer.weight is first), None)

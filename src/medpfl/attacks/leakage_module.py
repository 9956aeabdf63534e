"""Two dense layers in front of any model, made so that their gradient holds single images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medpfl.attacks.front import BIAS, SECOND_BIAS, SECOND_WEIGHT, WEIGHT, dense_in_front
from medpfl.attacks.number_grid import rows_and_biases
from medpfl.attacks.query_bins import QueryBins
from medpfl.core.domain import GlobalModel


@dataclass(frozen=True)
class LeakageModule:
    """What the two layers compute: offset + gain * direction * mean over k of relu(value_k - edge_k).

    The first layer's rows are scale * query and its biases -scale * edge_k, so that unit k is active for images whose
    value of its query (their mean value, where that is the only one) is above edge_k; the second layer's columns are all equal, gain * direction / (scale * K), so that every
    active unit gets the same error. The output does not depend on `scale`, but the first layer's gradient grows by
    1 / scale while its weights shrink by it.

    bins: queries and edges of the K units. direction: (D,) of length 1. offset: (D,). scale and gain: above 0. half: the type in
    which clients compute, if it is a half precision; rows and biases are then numbers of that type (`number_grid`), if the query is the mean value.
    """

    bins: QueryBins
    direction: Tensor
    offset: Tensor
    scale: float
    gain: float
    half: torch.dtype | None = None

    def in_front_of(self, model: GlobalModel) -> GlobalModel:
        """`model` with the module in front of it; the names of the model's own tensors get the prefix `body.`."""
        edges, inputs = self.bins.edges.flatten(), len(self.direction)
        sizes, biases = torch.full_like(edges, self.scale), -self.scale * edges
        if self.half is not None:
            entries, biases = rows_and_biases(edges, inputs, self.scale, self.half)
            sizes = entries * inputs
        return dense_in_front(model, self._tensors(sizes, biases))

    @property
    def alike(self) -> bool:
        """Whether all units of a query have the same weights, and only biases tell them apart."""
        return self.half is None

    def dead(self, live: GlobalModel) -> GlobalModel:
        """What `in_front_of` gave with all units off for every image, so that its first layer gets no gradient.

        All tensors but the biases are the same objects, which takes no memory twice.
        """
        highest = 4 * self.scale * self.bins.rows.clamp_min(0).sum(dim=1)  # rows in half precision: up to twice `scale`
        biases = -highest[self.bins.places // self.bins.edges.shape[1]].float()
        return replace(live, parameters={**live.parameters, BIAS: biases.to(live.device)})

    def alive_in(self, first: int, count: int, model: GlobalModel) -> GlobalModel:
        """The same with all units off for every image but `count` of them, from the unit `first` on."""
        alive = self.in_front_of(model)
        biases = self.dead(alive).parameters[BIAS].clone()
        biases[first : first + count] = alive.parameters[BIAS][first : first + count]
        return replace(alive, parameters={**alive.parameters, BIAS: biases})

    def _tensors(self, sizes: Tensor, biases: Tensor) -> dict[str, Tensor]:
        """sizes (K,): what the queries' weights are multiplied by."""
        column = self.gain * self.direction / (self.scale * self.bins.units)
        weight = torch.empty(len(sizes), len(column), device=column.device)
        for unit, size in enumerate(sizes):  # row by row, so that no copy in double precision of all is made
            weight[unit] = size * self.bins.rows[unit // self.bins.edges.shape[1]]
        tensors = {
            WEIGHT: weight,
            BIAS: biases.float(),
            SECOND_WEIGHT: column.float()[:, None].repeat(1, self.bins.units),
            SECOND_BIAS: self.offset.float(),
        }
        return {name: tensor.to(self.direction.device) for name, tensor in tensors.items()}

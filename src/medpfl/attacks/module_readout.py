"""Reads a leakage module's gradient: one query in closed form, several by peeling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from medpfl.attacks.bin_readout import Candidates, read_rows
from medpfl.attacks.front import BIAS, WEIGHT
from medpfl.attacks.narrowing import Rows, narrowed
from medpfl.attacks.query_bins import QueryBins
from medpfl.attacks.several_steps import biases_from_weights
from medpfl.attacks.span_peeling import read_by_peeling
from medpfl.attacks.updates import GradientView, gradient_view, linear_factors
from medpfl.core.domain import Observation


@dataclass(frozen=True)
class ModuleGradient:
    """What an update shows of the gradient of a module's first layer, in float64, as much of it as is asked for.

    alone: of all clients behind an aggregate, only the first had gradients there. first_only: of all local steps, only
    the first had. within: bins that tell what of the biases rounding may have hidden. block: first unit and number of the
    units that are looked at, as if there were no others; None for all.
    """

    observation: Observation
    alone: bool
    first_only: bool = False
    within: QueryBins | None = None
    block: tuple[int, int] | None = None

    @cached_property
    def bias(self) -> Tensor:
        """Of the biases, (K,)."""
        found = self._view({BIAS: self._rows(None)}).tensors[BIAS]
        return found if self.within is None else biases_from_weights(self.weight(), found, self.within)

    @property
    def notes(self) -> tuple[str, ...]:
        """Why it is not the gradient up to rounding; empty if it is."""
        return self._view({BIAS: None}).notes

    def weight(self, units: Tensor | None = None) -> Tensor:
        """Of the weights of these units, or of all: (M, D)."""
        return self._view({WEIGHT: self._rows(units)}).tensors[WEIGHT]

    def per_bin(self, units: Tensor, bins: QueryBins) -> Tensor:
        """What the images of these units' bins put into the gradient of the weights, (M, D)."""
        last = bins.last(units)
        factors = linear_factors(self.observation, self.first_only)
        if factors is None:
            rows = self.weight(torch.cat([units, units[~last] + 1]))
            rows[: len(units)][~last] -= rows[len(units) :]
            return rows[: len(units)]
        places = self._rows(units)
        assert places is not None  # as units are given
        found = self._differences(self.observation.update.trainable[WEIGHT], places, last).mul_(factors[0])
        if factors[1]:
            found.add_(self._differences(self.observation.sent_parameter(WEIGHT), places, last), alpha=factors[1])
        return found

    @staticmethod
    def _differences(tensor: Tensor, units: Tensor, last: Tensor) -> Tensor:
        """These rows less those after them, the last of a query as they are: (M, D), float64, without other copies."""
        found = torch.empty(len(units), tensor.shape[1], dtype=torch.float64, device=tensor.device)
        for row, unit, alone in zip(found, units.tolist(), last.tolist(), strict=True):
            row.copy_(tensor[unit])
            if not alone:
                row.sub_(tensor[unit + 1])
        return found

    def _rows(self, units: Tensor | None) -> Tensor | None:
        """Where these units, or all of the block, are among all units."""
        if self.block is None:
            return units
        first, count = self.block
        return torch.arange(first, first + count) if units is None else units + first

    def _view(self, rows: Rows) -> GradientView:
        return gradient_view(narrowed(self.observation, rows), alone=self.alone, first_only=self.first_only)


def read_module(
    gradient: ModuleGradient, bins: QueryBins, image_shape: tuple[int, ...], most: int, floor: float
) -> Candidates:
    """At most `most` images out of the module's gradient; see the two readers."""
    if len(bins.rows) == 1:
        return read_singles(gradient, bins, image_shape, most, floor)
    return read_by_peeling(gradient.weight(), gradient.bias, bins, image_shape, most)


def read_singles(
    gradient: ModuleGradient, bins: QueryBins, image_shape: tuple[int, ...], most: int, floor: float
) -> Candidates:
    """Images that are alone in a bin, without peeling: at most `most` for each query, the same maybe in several."""
    bins = bins.to(gradient.bias.device)
    return read_rows(
        lambda units: gradient.per_bin(units, bins),
        bins.per_bin(gradient.bias),
        *bins.bounds(bins.places),
        image_shape,
        most * len(bins.rows),
        floor,
        bins.rows,
    )

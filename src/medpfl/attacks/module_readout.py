"""Reads a leakage module's gradient: one query in closed form, several by peeling."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from medpfl.attacks.bin_readout import Candidates, read_rows
from medpfl.attacks.front import BIAS, WEIGHT
from medpfl.attacks.narrowing import Rows, narrowed
from medpfl.attacks.query_bins import QueryBins
from medpfl.attacks.several_steps import biases_from_weights
from medpfl.attacks.span_peeling import Gradients, read_by_peeling
from medpfl.attacks.updates import GradientView, gradient_view, linear_factors
from medpfl.core.domain import Observation


@dataclass(frozen=True)
class ModuleGradient:
    """What an update shows of the gradient of a module's first layer, in float64, as much of it as is asked for.

    alone: of all clients behind an aggregate, only the first had gradients there. first_only: of all local steps, only
    the first had. within: bins that tell what of the biases rounding may have hidden. block: first unit and number of the
    units that are looked at, as if there were no others; None for all. alike: all units of a query were sent with the
    same weights, so that these drop out of differences.
    """

    observation: Observation
    alone: bool
    first_only: bool = False
    within: QueryBins | None = None
    block: tuple[int, int] | None = None
    alike: bool = False

    @cached_property
    def bias(self) -> Tensor:
        """Of the biases, (K,)."""
        found = self._of_biases.tensors[BIAS]
        return found if self.within is None else biases_from_weights(self.weight(), found, self.within)

    @property
    def notes(self) -> tuple[str, ...]:
        """Why it is not the gradient up to rounding; empty if it is."""
        whole = self if self.block is None else replace(self, block=None)
        return whole._of_biases.notes

    @cached_property
    def _of_biases(self) -> GradientView:
        return self._view({BIAS: self._rows(None)})

    def weight(self, units: Tensor | None = None) -> Tensor:
        """Of the weights of these units, or of all: (M, D)."""
        return self._view({WEIGHT: self._rows(units)}).tensors[WEIGHT]

    def columns(self, part: slice) -> Tensor:
        """Of the weights of all units, for a part of their inputs: (K, n)."""
        factors = linear_factors(self.observation, self.first_only)
        if factors is None:
            return self._whole[:, part]
        tensor, sent = self.observation.update.trainable[WEIGHT], None
        if factors[1]:
            sent = self.observation.sent_parameter(WEIGHT)
        if self.block is not None:
            first, count = self.block
            tensor, sent = tensor[first : first + count], None if sent is None else sent[first : first + count]
        found = tensor[:, part].double() * factors[0]
        return found if sent is None else found.add_(sent[:, part].double(), alpha=factors[1])

    @cached_property
    def _whole(self) -> Tensor:
        return self.weight()

    def ratios(self, units: Tensor, steps: Tensor, bins: QueryBins, found: Tensor) -> None:
        """Writes to `found` (M, D) what the images of these units' bins put into the gradient of the weights, over what
        they put into that of the biases, `steps` (M,).

        A difference of two float32 numbers is exact in float32 where it cancels (Sterbenz) and rounded once elsewhere,
        so that double precision would only take longer.
        """
        last, factors = bins.last(units), linear_factors(self.observation, self.first_only)
        if factors is None:
            rows = self.weight(torch.cat([units, units[~last] + 1]))
            rows[: len(units)][~last] -= rows[len(units) :]
            torch.div(rows[: len(units)], steps[:, None], out=found)
            return
        of_update, of_sent = factors
        places = self._rows(units)
        assert places is not None  # as units are given
        _differences(self.observation.update.trainable[WEIGHT], places, last, found)
        differ = last.nonzero().flatten() if self.alike else torch.arange(len(units), device=units.device)
        before = None
        if of_sent and len(differ):
            before = found.new_empty(len(differ), found.shape[1])
            _differences(self.observation.sent_parameter(WEIGHT), places[differ], last[differ], before)
            if self.observation.update.kind == "weights":
                found[differ] -= before
                of_sent += of_update
        found.mul_((of_update / steps).to(found)[:, None])
        if before is not None and of_sent:
            found[differ] += before.mul_((of_sent / steps[differ]).to(found)[:, None])

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
    inputs = torch.Size(image_shape).numel()
    return read_by_peeling(Gradients(gradient.columns, gradient.bias, inputs), bins, image_shape, most)


def read_singles(
    gradient: ModuleGradient, bins: QueryBins, image_shape: tuple[int, ...], most: int, floor: float
) -> Candidates:
    """Images that are alone in a bin, without peeling: at most `most` for each query, the same maybe in several."""
    bins = bins.to(gradient.bias.device)
    steps = bins.per_bin(gradient.bias)
    return read_rows(
        lambda units, found: gradient.ratios(units, steps[units], bins, found),
        steps,
        *bins.bounds(bins.places),
        image_shape,
        most * len(bins.rows),
        floor,
        bins.rows,
    )


def _differences(tensor: Tensor, units: Tensor, last: Tensor, found: Tensor) -> Tensor:
    """Writes these rows less those after them, the last of a query as they are, to `found` (M, D), row by row: a row and
    its neighbor stay in a core's cache, and nothing is copied."""
    for row, unit, alone in zip(found, units.tolist(), last.tolist(), strict=True):
        if alone:
            row.copy_(tensor[unit])
        else:
            torch.sub(tensor[unit], tensor[unit + 1], out=row)
    return found

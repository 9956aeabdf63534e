"""Magnitude pruning of the update, as in CPL."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.domain import Tensors
from medpfl.core.mechanisms import Mechanism, Pruned, Scope
from medpfl.defenses.base import DEFENSES
from medpfl.defenses.compression import Compression, by_scope, joined


@DEFENSES.register(
    "prune",
    summary="entries below a percentile of the magnitudes are set to zero",
    paper="Wei et al.: A Framework for Evaluating Gradient Leakage Attacks in Federated Learning, ESORICS 2020",
    limits="the largest entries, which say most, are sent as they are; no privacy guarantee",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Prune(Compression):
    """An entry survives if its magnitude is at least the percentile, so that equal entries share one fate."""

    percentile: Annotated[
        float, Field(ge=0, lt=100, description="percentile of the magnitudes below which entries are left out")
    ] = 90.0
    scope: Annotated[Scope, Field(description="percentile of each tensor, or of all entries (global)")] = "tensor"

    def compress(
        self, change: Tensors, state: Tensors, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The change with small entries set to zero."""
        message: dict[str, Tensor] = {}
        for group in by_scope(change, self.scope):
            threshold = percentile(joined(group).abs(), self.percentile)
            message |= {name: torch.where(tensor.abs() >= threshold, tensor, 0.0) for name, tensor in group.items()}
        return message, {}

    def compressor(self) -> Mechanism:
        """Pruning at this percentile."""
        return Pruned(self.percentile, self.scope)


def percentile(values: Tensor, wanted: float) -> Tensor:
    """The percentile (0 to 100) of a vector, linear between neighbors. `torch.quantile` takes no more than 16 million.

    >>> percentile(torch.tensor([4.0, 1.0, 3.0, 2.0]), 50.0)
    tensor(2.5000)
    """
    ordered = values.sort().values
    place = wanted / 100 * (len(ordered) - 1)
    low = min(int(place), len(ordered) - 1)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])

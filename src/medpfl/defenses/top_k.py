"""The k largest entries of the update."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.domain import Tensors
from medpfl.core.mechanisms import Scope, TopK
from medpfl.defenses.base import DEFENSES
from medpfl.defenses.compression import Compression, by_scope, divided, joined


@DEFENSES.register(
    "top_k",
    summary="only the largest entries are sent",
    paper="Aji, Heafield: Sparse Communication for Distributed Gradient Descent, EMNLP 2017 (arXiv 1704.05021); feedback: "
    "Stich, Cordonnier, Jaggi: Sparsified SGD with Memory, NeurIPS 2018 (arXiv 1809.07599)",
    limits="the largest entries, which say most, are sent as they are, and all others are known to be smaller; no "
    "privacy guarantee",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class TopEntries(Compression):
    """Exactly ceil(share * entries) entries survive; among equal ones the client's generator chooses."""

    share: Annotated[float, Field(gt=0, le=1, description="share of the entries that is sent")] = 0.1
    scope: Annotated[Scope, Field(description="share of each tensor, or of all entries (global)")] = "tensor"

    def compress(
        self, change: Tensors, state: Tensors, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The change with all but the largest entries set to zero."""
        message: dict[str, Tensor] = {}
        for group in by_scope(change, self.scope):
            entries = joined(group)
            chosen = largest(entries.abs(), self.compressor().survivors(len(entries)), generator)
            message |= divided(torch.zeros_like(entries).index_put((chosen,), entries[chosen]), group)
        return message, {}

    def compressor(self) -> TopK:
        """This share of the entries."""
        return TopK(self.share, self.scope)


def largest(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Places (count,) of the largest values of a vector; among equal ones the generator chooses."""
    shuffled = torch.randperm(len(values), generator=generator).to(values.device)
    return shuffled[values[shuffled].argsort(descending=True, stable=True)[:count]]

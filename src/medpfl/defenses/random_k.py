"""Random entries of the update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.domain import Tensors
from medpfl.core.mechanisms import RandomK
from medpfl.defenses.base import DEFENSES
from medpfl.defenses.compression import Compression, divided


@DEFENSES.register(
    "random_k",
    summary="random entries are sent, scaled so that their expectation is the update",
    paper="Konecny et al.: Federated Learning: Strategies for Improving Communication Efficiency, 2016 (arXiv 1610.05492)",
    limits="what is sent is exact, and rounds on the same images show different entries; no privacy guarantee",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class RandomEntries(Compression):
    """In each tensor exactly ceil(share * entries) entries survive, drawn without regard to the data.

    They are multiplied by entries / survivors, which makes the message unbiased; with error feedback they are not,
    because what is left out comes later.
    """

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "idlg", "distance": "likelihood", "total_variation": 1e-3}

    share: Annotated[float, Field(gt=0, le=1, description="share of each tensor's entries that is sent")] = 0.1

    def compress(
        self, change: Tensors, state: Tensors, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The change with all but some entries set to zero."""
        message: dict[str, Tensor] = {}
        for name, tensor in change.items():
            entries, mechanism = tensor.reshape(-1), self.compressor()
            drawn = torch.randperm(len(entries), generator=generator).to(entries.device)
            chosen = drawn[: mechanism.survivors(len(entries))]
            values = entries[chosen] * mechanism.factor(len(entries))
            message |= divided(torch.zeros_like(entries).index_put((chosen,), values), {name: tensor})
        return message, {}

    def compressor(self) -> RandomK:
        """This share of the entries."""
        return RandomK(self.share, unbiased=not self.error_feedback)

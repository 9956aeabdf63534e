"""The signs of the update."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.domain import GlobalModel, Recipe, Tensors
from medpfl.core.mechanisms import Mechanism, Signs
from medpfl.defenses.base import DEFENSES
from medpfl.defenses.compression import Compression


@DEFENSES.register(
    "sign",
    summary="only the sign of every entry is sent, times the tensor's mean magnitude",
    paper="Bernstein et al.: signSGD, ICML 2018 (arXiv 1802.04434); scale and feedback: Karimireddy et al.: Error "
    "Feedback Fixes SignSGD, ICML 2019 (arXiv 1901.09847)",
    limits="signs of many entries still determine an image in a small model; no privacy guarantee",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sign(Compression):
    """Entries become -1, 0 or 1, times the mean magnitude of their tensor (`scale: mean`) or as they are (`none`)."""

    scale: Annotated[
        Literal["mean", "none"], Field(description="what signs are multiplied by: the tensor's mean magnitude, or 1")
    ] = "mean"

    def compress(
        self, change: Tensors, state: Tensors, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The signs of the change."""
        scaled = self.scale == "mean"
        return {name: one.sign() * one.abs().mean() if scaled else one.sign() for name, one in change.items()}, {}

    def compressor(self) -> Mechanism:
        """Signs with this scale."""
        return Signs(self.scale == "mean")

    def refusals(self, model: GlobalModel, recipe: Recipe) -> list[str]:
        """Bare signs of a change would move every weight by one."""
        if self.scale == "mean" or recipe.update == "gradient":
            return []
        return [f"scale: none would change every weight by 1 with update: {recipe.update}; use scale: mean"]

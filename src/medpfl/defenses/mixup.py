"""Mixup: clients train on mixtures of their images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.mechanisms import Mechanism, Mixtures
from medpfl.defenses.base import DEFENSES, Defense
from medpfl.defenses.mixing import mixed, why_no_mixing


@DEFENSES.register(
    "mixup",
    summary="every training image is a weighted mean of several of the batch, and so is its label",
    paper="Zhang et al.: mixup: Beyond Empirical Risk Minimization, ICLR 2018 (arXiv 1710.09412)"
    "; as a defense: Huang et al., NeurIPS 2021 (arXiv 2112.00059)",
    limits="mixtures come back of updates as images do, and several of them together show the images; partners are of "
    "the client's own batch; no privacy guarantee",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Mixup(Defense):
    """Images and labels (one-hot) of a batch become sums of `images` of them, weights from Dirichlet(3, 1, ..., 1) with none
    above `largest`, new ones in every step.
    """

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "mixture_decoding"}

    images: Annotated[int, Field(ge=2, description="images in every mixture")] = 4
    largest: Annotated[float, Field(gt=0, le=1, description="largest weight of an image in a mixture")] = 0.65

    def batch(self, batch: Batch, model: GlobalModel, generator: torch.Generator) -> Batch:
        """The mixtures."""
        return mixed(batch, model, self.images, self.largest, generator)

    def mechanism(self) -> Mechanism:
        """Mixtures of so many images."""
        return Mixtures(self.images, signs=False)

    def refusals(self, model: GlobalModel, recipe: Recipe) -> list[str]:
        """Batches of one image, weights that cannot be."""
        return why_no_mixing("mixup", recipe, self.images, self.largest)

    def warnings(self) -> tuple[str, ...]:
        """No guarantee."""
        return (
            "Mixup trains on mixtures of the client's own images: there is no formal guarantee, and mixtures of several "
            "rounds can be taken apart",
        )

"""InstaHide: clients train on mixtures of their images whose pixels change sign at random."""

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
    "instahide",
    summary="every training image is a weighted mean of several of the batch, every pixel turned around at random",
    paper="Huang et al.: InstaHide: Instance-hiding Schemes for Private Distributed Learning, ICML 2020 (arXiv 2010.02772)"
    "; broken by Carlini et al., S&P 2021 (arXiv 2011.05315)",
    limits="mixtures come back of updates as images do, and several of them together show the images; partners are of "
    "the client's own batch; no privacy guarantee",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class InstaHide(Defense):
    """As Mixup, and then each pixel p of the mixture becomes 1 - p with probability 1/2: on the scale from -1 to 1 that is
    a random sign, which |2 p - 1| does not show.
    """

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "mixture_decoding"}

    images: Annotated[int, Field(ge=2, description="images in every mixture")] = 4
    largest: Annotated[float, Field(gt=0, le=1, description="largest weight of an image in a mixture")] = 0.65

    def batch(self, batch: Batch, model: GlobalModel, generator: torch.Generator) -> Batch:
        """The mixtures with random signs."""
        mixtures = mixed(batch, model, self.images, self.largest, generator)
        turned = (
            torch.rand(mixtures.images.shape, generator=generator, dtype=torch.float64).to(mixtures.images.device) < 0.5
        )
        return Batch(torch.where(turned, 1.0 - mixtures.images, mixtures.images), mixtures.targets)

    def mechanism(self) -> Mechanism:
        """Mixtures of so many images, with signs."""
        return Mixtures(self.images, signs=True)

    def refusals(self, model: GlobalModel, recipe: Recipe) -> list[str]:
        """Batches of one image, weights that cannot be."""
        return why_no_mixing("instahide", recipe, self.images, self.largest)

    def warnings(self) -> tuple[str, ...]:
        """No guarantee."""
        return (
            "InstaHide trains on mixtures of the client's own images: there is no formal guarantee, and mixtures of several "
            "rounds can be taken apart",
        )

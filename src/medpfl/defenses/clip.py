"""A bound on the norm of everything that a client sends in a round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.core.domain import ClientState, GlobalModel, Update
from medpfl.core.mechanisms import Clipped, Mechanism, NormKind
from medpfl.core.recipes import Recipe
from medpfl.defenses.base import DEFENSES, Bound, Defense
from medpfl.defenses.clipping import clipped
from medpfl.federation.changes import sent_change, with_change

NO_NOISE = (
    "clipping without noise changes the length of the update and not its direction: it gives no differential-privacy "
    "guarantee, and attacks that match directions see as much as without it"
)


@DEFENSES.register(
    "clip",
    summary="scales the whole update (of weights: their change) down to a norm of at most `bound`",
    limits="hides the update's length and nothing else, so it is no defense alone; it bounds what a client contributes, and "
    "what an image contributes only where the update is of one image; buffers and counters are sent as they are",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Clip(Defense):
    """All trainable tensors times min(1, bound / their joint norm). With noise after it, a mechanism with a guarantee."""

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "gradinv", "distance": "likelihood"}

    bound: Annotated[float, Field(gt=0, allow_inf_nan=False, description="largest norm that is sent")] = 1.0
    norm: Annotated[NormKind, Field(description="l2 (for Gaussian noise after it) or l1 (for Laplace noise)")] = "l2"
    unit: Annotated[
        Literal["client", "image"],
        Field(description="whose contribution it is claimed to bound; image is refused unless a round is of one image"),
    ] = "client"

    def update(
        self, update: Update, model: GlobalModel, state: ClientState, generator: torch.Generator
    ) -> tuple[Update, ClientState]:
        """The shorter update; one that holds a number that is not finite becomes NaN throughout."""
        change = clipped(sent_change(update, model.parameters), self.bound, self.norm)
        return with_change(update, model.parameters, change), state

    def sends_at_most(self) -> Bound:
        """The bound."""
        return Bound(self.bound, self.norm, self.unit)

    def mechanism(self) -> Mechanism:
        """Clipping to this bound."""
        return Clipped(self.bound, self.norm)

    def refusals(self, model: GlobalModel, recipe: Recipe) -> list[str]:
        """The norm of a mean over several images bounds none of them."""
        if self.unit == "client" or recipe.private_images == 1:
            return []
        return [
            f"clip: the update is of {recipe.private_images} images, so its norm bounds nothing of a single image; use "
            "unit: client, or dp_sgd, which clips each image's gradient"
        ]

    def warnings(self) -> tuple[str, ...]:
        """No noise, no guarantee."""
        return (NO_NOISE,)

"""Vetting of the received model as a guard."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.core.errors import ModelError
from medpfl.federation.guarding import Received, Verdict
from medpfl.guards.base import GUARDS, Guard
from medpfl.guards.vetting import vet

MOST_IMAGES = 16
"""So many of the client's own images are enough for the simulated step."""

FEWEST_IMAGES = 8
"""Of fewer every honest dense layer gives most back, so drawn images are taken."""


@GUARDS.register(
    "vetting",
    summary="looks at the received model before any training on it, as `medpfl vet` does",
    limits="the training code, the recipe and the aggregation are not looked at; a careful attacker disguises tensors",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class VettingGuard(Guard):
    """Takes part only if no check finds what honest training does not make; `medpfl vet` says which checks there are."""

    withhold: Annotated[
        Literal["leaks", "crafted"],
        Field(description="stay away from models that leak, or only from those that are crafted"),
    ] = "crafted"

    agreed_model: Annotated[
        bool,
        Field(
            description="the client builds the model that was agreed on by itself and loads what came into it: added "
            "layers are found at once; off, nobody agreed on an architecture"
        ),
    ] = False
    reference: Annotated[
        bool,
        Field(
            description="the client kept the model of a round that it trusts and compares; in an audit that is what an "
            "honest server would have sent, so that it never alarms without an attack"
        ),
    ] = False

    def before(self, received: Received) -> Verdict:
        """What vetting finds; a model that it cannot look at is not trained on."""
        trusted = received.agreed
        images = received.batch.images[:MOST_IMAGES] if len(received.batch) >= FEWEST_IMAGES else None
        try:
            found = vet(
                received.model,
                trusted if self.reference else None,
                images,
                agreed=trusted if self.agreed_model else None,
            )
        except ModelError as error:
            return Verdict("vetting", "unusable", True, (str(error),))
        withholds = found.verdict == "crafted" or found.verdict == self.withhold
        return Verdict("vetting", found.verdict, withholds, found.reasons)

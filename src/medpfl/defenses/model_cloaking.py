"""A stand-in for Model Cloaking: noise on the update that falls over the rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.core.domain import ClientState, GlobalModel, Update
from medpfl.core.guarantees import Guarantee, Release
from medpfl.core.mechanisms import Mechanism
from medpfl.core.recipes import Recipe
from medpfl.defenses.base import DEFENSES, Defense, Noise
from medpfl.defenses.client_noise import client_guarantee, client_mechanism, clipped_and_noisy

STAND_IN = (
    "the algorithm of Model Cloaking was not found in public; this is a stand-in (clipping, and noise that falls "
    "geometrically over the rounds), so its figures say nothing about the published one"
)


@DEFENSES.register(
    "model_cloaking",
    summary="a stand-in for Model Cloaking: a client's update clipped, with normal noise that falls over the rounds",
    paper="Model Cloaking against Gradient Leakage, ICDM 2023, of which the abstract only was found",
    limits=f"{STAND_IN}; late rounds have the least noise; buffers and counters are sent as they were received",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelCloaking(Defense):
    """In round t, counted from 0, the noise multiplier is s_t = max(noise_multiplier * decay^t, floor)."""

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "maximum_a_posteriori"}

    bound: Annotated[float, Field(gt=0, allow_inf_nan=False, description="largest norm of a client's change")] = 4.0
    noise_multiplier: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False, description="standard deviation of the first round's noise over the bound"),
    ] = 1.0
    decay: Annotated[float, Field(gt=0, le=1, description="factor from one round to the next")] = 0.99
    floor: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="least noise multiplier, not above the first round's")
    ] = 0.0

    def __post_init__(self) -> None:
        if self.floor > self.noise_multiplier:
            raise ValueError(
                f"floor: {self.floor:g} is above noise_multiplier: {self.noise_multiplier:g}; noise falls towards its floor"
            )

    def in_round(self, number: int) -> ModelCloaking:
        """The same with the noise of this round.

        >>> ModelCloaking(noise_multiplier=1.0, decay=0.5, floor=0.2).in_round(2).noise_multiplier
        0.25
        """
        return replace(self, noise_multiplier=self._release.in_round(number))

    @property
    def _release(self) -> Release:
        return Release("gaussian", self.noise_multiplier, decay=self.decay, floor=self.floor)

    def update(
        self, update: Update, model: GlobalModel, state: ClientState, generator: torch.Generator
    ) -> tuple[Update, ClientState]:
        """The clipped update with noise."""
        return clipped_and_noisy(update, model, self.bound, self.noise_multiplier * self.bound, generator), state

    def adds(self) -> Noise:
        """The noise of the first round."""
        return Noise("gaussian", self.noise_multiplier * self.bound)

    def mechanism(self) -> Mechanism:
        """Clipping and noise of the first round; `in_round` has those of the others."""
        return client_mechanism(self.bound, self.noise_multiplier * self.bound)

    def guarantee(self, recipe: Recipe, images: int) -> Guarantee:
        """Per client, with the scale of every round."""
        return client_guarantee(self._release)

    def warnings(self) -> tuple[str, ...]:
        """It is not the published algorithm."""
        return (STAND_IN,)

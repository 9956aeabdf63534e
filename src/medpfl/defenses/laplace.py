"""Laplace noise on the update, as in MedPFL and CPL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.core.domain import ClientState, GlobalModel, Update
from medpfl.core.mechanisms import LaplaceNoise, Mechanism
from medpfl.defenses.base import DEFENSES, Defense, Noise
from medpfl.defenses.noise import NO_GUARANTEE, laplacian, with_noise


@DEFENSES.register(
    "laplace",
    summary="independent Laplace(0, scale) noise on every trainable entry of the update",
    paper="Das, Amini, Wu: Privacy Risks Analysis and Mitigation in Federated Learning for Medical Images, BIBM 2023",
    limits="no clipping, hence no privacy guarantee (compose it after clip with norm: l1 for one); buffers and counters are "
    "sent without noise",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Laplace(Defense):
    """Adds Laplace(0, scale) to gradients, deltas and weights alike. MedPFL: scale 1/100, 1/200, 1/300, 1/400."""

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "maximum_a_posteriori", "prior": "total_variation"}

    scale: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="scale b of the noise; standard deviation b * sqrt(2)")
    ] = 0.01

    def update(
        self, update: Update, model: GlobalModel, state: ClientState, generator: torch.Generator
    ) -> tuple[Update, ClientState]:
        """The noisy update; noise is drawn in double precision, so its values do not depend on the update's."""
        return with_noise(update, laplacian(self.scale, generator)), state

    def adds(self) -> Noise:
        """Laplace noise."""
        return Noise("laplace", self.scale)

    def mechanism(self) -> Mechanism:
        """Laplace noise of this scale."""
        return LaplaceNoise(self.scale)

    def warnings(self) -> tuple[str, ...]:
        """No clipping, no guarantee."""
        return (NO_GUARANTEE.format(noise="Laplace"),)

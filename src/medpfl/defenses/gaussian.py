"""Normal noise on the update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.core.domain import ClientState, GlobalModel, Update
from medpfl.core.mechanisms import GaussianNoise, Mechanism
from medpfl.defenses.base import DEFENSES, Defense, Noise
from medpfl.defenses.noise import NO_GUARANTEE, normal, with_noise


@DEFENSES.register(
    "gaussian",
    summary="independent normal noise on every trainable entry of the update",
    paper="Wei et al.: A Framework for Evaluating Gradient Leakage Attacks in Federated Learning, ESORICS 2020",
    limits="no clipping, hence no privacy guarantee (compose it after clip for one); buffers and counters are sent without "
    "noise",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Gaussian(Defense):
    """Adds Normal(0, std^2) to gradients, deltas and weights alike."""

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "maximum_a_posteriori", "prior": "total_variation"}

    std: Annotated[float, Field(gt=0, allow_inf_nan=False, description="standard deviation of the noise")] = 0.01

    def update(
        self, update: Update, model: GlobalModel, state: ClientState, generator: torch.Generator
    ) -> tuple[Update, ClientState]:
        """The noisy update; noise is drawn in double precision, so its values do not depend on the update's."""
        return with_noise(update, normal(self.std, generator)), state

    def adds(self) -> Noise:
        """Normal noise."""
        return Noise("gaussian", self.std)

    def mechanism(self) -> Mechanism:
        """Normal noise of this standard deviation."""
        return GaussianNoise(self.std)

    def warnings(self) -> tuple[str, ...]:
        """No clipping, no guarantee."""
        return (NO_GUARANTEE.format(noise="Gaussian"),)

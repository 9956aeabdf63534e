"""Personalized local differential privacy: every entry of the update becomes one of three numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.domain import ClientState, GlobalModel, Update
from medpfl.core.guarantees import Guarantee, Release
from medpfl.core.mechanisms import ThreeValues
from medpfl.core.recipes import Recipe
from medpfl.defenses.base import DEFENSES, Defense
from medpfl.federation.changes import sent_change, with_change, with_received_statistics

PER_WEIGHT = (
    "epsilon holds for one entry in one round: m entries over T rounds compose to m * T * epsilon, which for whole images is "
    "no protection that the number promises"
)


@DEFENSES.register(
    "local_dp",
    summary="every entry of the update is sent as one of three random numbers with the right mean (PLDP-FL)",
    paper="Shen, Liu, Chen et al.: PLDP-FL: Federated Learning with Personalized Local Differential Privacy, Entropy 2023",
    limits=f"{PER_WEIGHT}; entries beyond half the length are cut off, which biases them; buffers and counters are sent as "
    "they were received",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class LocalDP(Defense):
    """Perturbation mechanism PDPM with each client's own epsilon and interval length (PLDP-FL, section 4).

    An entry's change v, cut off at +-length / 2, is sent as 0 or as +-length (E + 2) / (2 (E - 1)), E = exp(epsilon), with
    probabilities that make the mean v. Of weights the midpoint of the interval is the received weight.
    """

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "maximum_a_posteriori"}

    epsilon: Annotated[float, Field(gt=0, le=50, description="epsilon of one entry in one round")] = 1.0
    length: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="length of the interval of an entry's change, around zero")
    ] = 0.1

    def update(
        self, update: Update, model: GlobalModel, state: ClientState, generator: torch.Generator
    ) -> tuple[Update, ClientState]:
        """Three values; whatever is not finite stays so."""
        change = sent_change(update, model.parameters)
        sent = {name: self._sent(tensor, generator) for name, tensor in change.items()}
        return with_received_statistics(with_change(update, model.parameters, sent), model), state

    def _sent(self, values: Tensor, generator: torch.Generator) -> Tensor:
        up, down = probabilities(values, self.epsilon, self.length)
        draws = torch.rand(values.shape, dtype=torch.float64, generator=generator).to(values)
        signs = (draws < up).to(values.dtype) - (draws >= 1.0 - down).to(values.dtype)
        sent = signs * self.mechanism().magnitude
        return torch.where(torch.isfinite(values), sent, torch.nan)

    def mechanism(self) -> ThreeValues:
        """Three values with these probabilities."""
        return ThreeValues(self.epsilon, self.length)

    def guarantee(self, recipe: Recipe, images: int) -> Guarantee:
        """Per entry."""
        return Guarantee("weight", "replace", (Release("randomized_response", self.epsilon),), remarks=(PER_WEIGHT,))

    def warnings(self) -> tuple[str, ...]:
        """The unit is an entry."""
        return (PER_WEIGHT,)


def probabilities(values: Tensor, epsilon: float, length: float) -> tuple[Tensor, Tensor]:
    """Of sending the positive and of sending the negative number, for each value; 0 is sent with 1 / (E + 2).

    >>> up, down = probabilities(torch.tensor([0.5, -9.0]), epsilon=math.log(3.0), length=1.0)
    >>> [round(float(p), 3) for p in (*up, *down)]
    [0.6, 0.2, 0.2, 0.6]
    """
    grown = math.exp(epsilon)
    tilt = values.clamp(-length / 2, length / 2) * (grown - 1.0) / (length * (grown + 2.0))
    middle = (grown + 1.0) / (2.0 * (grown + 2.0))
    return middle + tilt, middle - tilt

"""Channels behind which a server sees several clients' updates as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.domain import Update
from medpfl.federation.aggregation import as_update, stochastically_rounded, summed
from medpfl.federation.channels import CHANNELS, Channel

MOST_STEPS = 2**31 - 1
"""The largest whole number of 32 bits, to which Flower's clients round: above it what they send wraps around."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SecureChannel(Channel):
    """What secure channels have in common: the victim's update arrives together with those of bystanders."""

    clients: Annotated[
        int, Field(ge=1, description="clients whose updates arrive as one: the victim and so many bystanders less one")
    ] = 8
    score: Annotated[
        Literal["victim", "all"], Field(description="whose images are scored: the victim's or those of all clients")
    ] = "victim"

    reveals_individual_updates = False

    @model_validator(mode="after")
    def _several(self) -> SecureChannel:
        if self.clients < 2:
            raise ValueError(
                "clients: 1 is no aggregation, a sum over one client is its update; use 2 or more, or plain"
            )
        return self

    bytes_per_entry = 6

    @property
    def client_count(self) -> int:
        """How many clients' updates arrive as one."""
        return self.clients

    @property
    def scored_clients(self) -> int:
        """How many of the clients are scored."""
        return self.clients if self.score == "all" else 1


@CHANNELS.register(
    "secure_sum",
    summary="ideal secure aggregation: only the mean over all clients' updates arrives, without any rounding",
    paper="Bonawitz et al.: Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017",
    limits="computed in float64 in place of a protocol; no client drops out",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class SecureSum(SecureChannel):
    """The mean over clients, which says the same as their sum to whoever knows their numbers of examples.

    To the adversary it is one update, computed from the images of all clients.
    """

    weighting: Annotated[
        Literal["examples", "equal"], Field(description="clients count by their numbers of examples, or all alike")
    ] = "examples"

    def done(self) -> str:
        """That only the mean arrives."""
        return f"The server receives the mean of {self.clients} clients' updates, exactly, and no update of one client."

    def send(self, updates: Iterable[Update], generator: torch.Generator) -> Update:
        """The mean in float64; draws nothing."""

        def weight(update: Update) -> int:
            return update.examples if self.weighting == "examples" else 1

        sums, first, examples = summed(updates, lambda tensor, update: tensor.double() * weight(update))
        whole = sum(examples) if self.weighting == "examples" else len(examples)
        return as_update(sums, lambda tensor: tensor / max(1, whole), first, sum(examples))


@CHANNELS.register(
    "secagg_plus",
    summary="the arithmetic of Flower's SecAgg+: scaled by examples, clipped, rounded at random, summed in integers",
    paper="Bell et al.: Secure Single-Server Aggregation with (Poly)Logarithmic Overhead, CCS 2020; Flower 1.28, "
    "secaggplus_mod and SecAggPlusWorkflow",
    limits="masks and shares cancel and are left out; no client drops out",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class SecAggPlus(SecureChannel):
    """What the server computes from masked integers; defaults are Flower's.

    A client with n examples multiplies every tensor of what it sends (Flower: the new weights, buffers and counters
    included) by n / max_weight, clips at +- clipping_range, and rounds at random to one of quantization_range steps.
    The server sums modulo modulus_range and divides by the summed n / max_weight. In units of one client's tensors a
    step is 2 * clipping_range / quantization_range * max_weight / n, and what lies outside clipping_range *
    max_weight / n is cut off. What is sent is the recipe's `update`; Flower's clients send `weights`.
    """

    clipping_range: Annotated[float, Field(gt=0, description="weighted values are clipped at this size")] = 8.0
    quantization_range: Annotated[
        int,
        Field(
            ge=2,
            le=MOST_STEPS,
            description="steps from one end of the clipping to the other; Flower rounds to whole numbers of 32 bits",
        ),
    ] = 2**22
    modulus_range: Annotated[int, Field(ge=2, le=2**62, description="sums are taken modulo this number")] = 2**32
    max_weight: Annotated[float, Field(gt=0, description="number of examples that counts as weight 1")] = 1000.0

    bytes_per_entry = 10

    chosen_by_server = frozenset({"clipping_range", "quantization_range"})

    def fitted(self, largest: float, examples: int) -> Mapping[str, float]:
        """The narrowest clipping that these values pass, so that all steps of the quantization are theirs."""
        return {"clipping_range": largest * examples / self.max_weight} if largest > 0 else {}

    def warnings(self, examples: int) -> tuple[str, ...]:
        """Where clients weigh more than 1, what they send is stretched beyond the clipping and the modulus."""
        if examples <= self.max_weight:
            return ()
        stretched = examples / self.max_weight
        return (
            f"clients hold {examples} images and max_weight is {self.max_weight:g}: what they send is multiplied by "
            f"{stretched:.3g}, so that SecAgg+ clips values above {self.clipping_range / stretched:.3g}; give max_weight at "
            "least their number of images",
        )

    def done(self) -> str:
        """How values are scaled, clipped and rounded on the way."""
        return (
            f"Each of {self.clients} clients multiplies what it sends by its number of examples / {self.max_weight:g}, "
            f"clips it at +-{self.clipping_range:g} and rounds it at random to one of {self.quantization_range} steps; the "
            "server receives only the sum of these whole numbers and computes the mean from it. Changes below a step, "
            f"{2 * self.clipping_range / self.quantization_range * self.max_weight:.2g} / examples, drown in the rounding."
        )

    def send(self, updates: Iterable[Update], generator: torch.Generator) -> Update:
        """The weighted mean as the server recovers it, in float64. Raises `ValueError` without any update."""
        sums, first, examples = summed(updates, lambda tensor, update: self._encoded(tensor, update, generator))
        ratio = sum(self._ratio(count) for count in examples) % self.modulus_range
        step = 2 * self.clipping_range / self.quantization_range
        clients = len(examples)

        def decoded(tensor: Tensor) -> Tensor:
            shifted = tensor.remainder(self.modulus_range).double() * step - clients * self.clipping_range
            return shifted * (self.quantization_range / max(1, ratio))

        return as_update(sums, decoded, first, sum(examples))

    def _ratio(self, examples: int) -> int:
        """A client's weight in steps of 1 / quantization_range."""
        return round(examples / self.max_weight * self.quantization_range)

    def _encoded(self, tensor: Tensor, update: Update, generator: torch.Generator) -> Tensor:
        """What a client puts under its mask, int64; computed in the tensor's own precision, as Flower does."""
        values = tensor.float() if not tensor.is_floating_point() else tensor
        weighted = values * (self._ratio(update.examples) / self.quantization_range)
        clipped = weighted.clamp(-self.clipping_range, self.clipping_range) + self.clipping_range
        return stochastically_rounded(clipped * (self.quantization_range / (2 * self.clipping_range)), generator)

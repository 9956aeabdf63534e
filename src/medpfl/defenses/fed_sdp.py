"""Fed-SDP: a client's whole update of a round clipped, with noise, once per round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.core.domain import ClientState, GlobalModel, Update
from medpfl.core.guarantees import Guarantee, Release
from medpfl.core.mechanisms import Mechanism
from medpfl.core.recipes import Recipe
from medpfl.defenses.base import DEFENSES, Bound, Defense, Noise
from medpfl.defenses.client_noise import client_guarantee, client_mechanism, clipped_and_noisy
from medpfl.defenses.noise import normal, with_noise


@DEFENSES.register(
    "fed_sdp",
    summary="a client's update of a round clipped to `bound`, normal noise on it once, added by the client or by the server",
    paper="Wei, Liu, Wu, Su, Iyengar: Gradient-Leakage Resilient Federated Learning, ICDCS 2021",
    limits="protects a client as a whole, not what leaks inside it before the noise; with added_by: server the channel and the "
    "server see everything; buffers and counters are sent as they were received",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class FedSDP(Defense):
    """Change of the round times min(1, bound / norm), plus Normal(0, (noise_multiplier bound)^2) on every entry.

    With `added_by: server` nothing is added before the update is sent: what adversaries at the server and on the channel
    see is clipped only, and the guarantee holds against those who see released models.
    """

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "maximum_a_posteriori"}

    bound: Annotated[float, Field(gt=0, allow_inf_nan=False, description="largest norm of a client's change")] = 4.0
    noise_multiplier: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="standard deviation of the noise over the bound")
    ] = 1.0
    added_by: Annotated[Literal["client", "server"], Field(description="who adds the noise")] = "client"

    def update(
        self, update: Update, model: GlobalModel, state: ClientState, generator: torch.Generator
    ) -> tuple[Update, ClientState]:
        """What leaves the client: clipped, and with noise if the client adds it."""
        return clipped_and_noisy(update, model, self.bound, self._sent_std, generator), state

    def aggregated(self, update: Update, clients: int, generator: torch.Generator) -> Update:
        """The mean with what is left of noise that the server adds to every client's update."""
        if self.added_by == "client" or self.noise_multiplier == 0:
            return update
        return with_noise(update, normal(self.noise_multiplier * self.bound / clients**0.5, generator))

    @property
    def _sent_std(self) -> float:
        return self.noise_multiplier * self.bound if self.added_by == "client" else 0.0

    def sends_at_most(self) -> Bound | None:
        """The bound, where the client adds nothing."""
        return Bound(self.bound, "l2") if self._sent_std == 0 else None

    def adds(self) -> Noise | None:
        """The client's noise."""
        return Noise("gaussian", self._sent_std) if self._sent_std > 0 else None

    def mechanism(self) -> Mechanism:
        """Clipping, then the client's noise."""
        return client_mechanism(self.bound, self._sent_std)

    def guarantee(self, recipe: Recipe, images: int) -> Guarantee | None:
        """Per client and round; None without noise."""
        if self.noise_multiplier == 0:
            return None
        return client_guarantee(Release("gaussian", self.noise_multiplier), by_server=self.added_by == "server")

    def warnings(self) -> tuple[str, ...]:
        """Noise that comes too late, or not at all."""
        if self.noise_multiplier == 0:
            return ("clipping without noise gives no differential-privacy guarantee",)
        if self.added_by == "server":
            return (
                "the server adds the noise: what it receives, and what passes the channel, has none and is not covered by "
                "the guarantee",
            )
        return ()

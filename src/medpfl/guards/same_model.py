"""Whether all clients of a round received the same model."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.federation.guarding import Received, Verdict
from medpfl.guards.base import GUARDS, Guard
from medpfl.guards.digests import digest


@GUARDS.register(
    "same_model",
    summary="clients compare digests of what they received over a channel of their own, before any training",
    limits="stops different models for different clients and nothing else; needs a channel between clients that the "
    "server does not control; clients that work for the server can lie about theirs",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class SameModel(Guard):
    """Nobody takes part unless all say that they received the same, by `medpfl.guards.digests`."""

    def before(self, received: Received) -> Verdict:
        """Whether the digests of all models of the round are equal."""
        own = digest(received.model)
        others = {id(model): model for model in received.others if model is not received.model}
        different = sum(digest(model) != own for model in others.values())
        if not different:
            return Verdict("same_model", "passed", False)
        return Verdict("same_model", "crafted", True, ("other clients of the round received another model",))

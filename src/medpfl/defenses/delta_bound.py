"""A bound on the norm of what a client's local training changes, with the client's recipe pinned."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.core.mechanisms import Clipped, Mechanism
from medpfl.defenses.base import DEFENSES
from medpfl.defenses.clip import Clip


@DEFENSES.register(
    "delta_bound",
    summary="a norm bound on the whole update before any channel, by clients who train and aggregate as agreed",
    limits="stops what must be loud to survive the quantization of secure aggregation (crafted layers), nothing that is read "
    "in full precision; no differential-privacy guarantee; buffers and counters are not bounded",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class DeltaBound(Clip):
    """Clips like `clip`, and ignores a recipe or parameters of the channel that the server tells in place of agreed ones.

    A server that may choose the learning rate makes any bound on the change a bound on nothing: it asks for large steps
    of a crafted layer, whose own size the bound does not limit. So both belong together.
    """

    pins_agreement = True

    def mechanism(self) -> Mechanism:
        """Clipping to this bound."""
        return Clipped(self.bound, self.norm)

"""A bound on the length of what a client sends."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.federation.changes import norm, sent_change
from medpfl.federation.guarding import Trained, Verdict
from medpfl.guards.base import GUARDS, Guard


@GUARDS.register(
    "norm_bound",
    summary="withholds an update that is longer than honest ones: what is quantized afterwards hides little of it else",
    limits="stops what must be loud to survive quantization (SecAgg+), nothing that is read in full precision; holds "
    "only if clients pin their own recipe and the aggregation's clipping and quantization",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class NormBound(Guard):
    """Measures the joint L2 norm of all trainable tensors of the update before any aggregation.

    Of `delta` and `weights` that is the length of the change, of `gradient` that of the gradient. Secure aggregation
    cuts off and rounds what it is sent, so a crafted layer must change much to be read behind it.
    """

    bound: Annotated[float, Field(gt=0, allow_inf_nan=False, description="longest update that is sent")] = 10.0

    def after(self, trained: Trained) -> Verdict:
        """Whether the update is too long, or not finite."""
        length = norm(sent_change(trained.update, trained.received.model.parameters))
        if not length < float("inf"):
            return Verdict("norm_bound", "unusable", True, ("the update holds numbers that are not finite",))
        if length <= self.bound:
            return Verdict("norm_bound", "passed", False)
        reason = f"the update's norm is {length:.3g}, above the bound of {self.bound:g}"
        return Verdict("norm_bound", "crafted", True, (reason,))

"""The key `guarantee` of a spec."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GuaranteeSettings:
    """For what guarantees are computed: `guarantee: {delta: 1e-5, rounds: 20}`."""

    delta: Annotated[float, Field(gt=0, lt=1, description="the delta at which epsilon is given")] = 1e-5
    rounds: Annotated[
        int, Field(ge=1, description="rounds that a client takes part in, over which guarantees are composed")
    ] = 1
    images_per_patient: Annotated[
        int,
        Field(
            ge=1, description="images of one patient at most; above 1, guarantees for images become such for patients"
        ),
    ] = 1

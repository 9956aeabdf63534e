"""No defense."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.defenses.base import DEFENSES, Defense


@DEFENSES.register("none", summary="the update is sent as it is", limits="protects nothing")
@dataclass(frozen=True, kw_only=True, config=STRICT)
class NoDefense(Defense):
    """Changes nothing."""

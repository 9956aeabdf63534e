"""No guard."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.guards.base import GUARDS, Guard


@GUARDS.register("none", summary="whatever comes is trained on and whatever results is sent", limits="stops nothing")
@dataclass(frozen=True, kw_only=True, config=STRICT)
class NoGuard(Guard):
    """Looks at nothing."""

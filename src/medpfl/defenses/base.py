"""What a defense is: hooks into the client's round, as a frozen configuration."""

from __future__ import annotations

from medpfl.core.registry import Registry
from medpfl.federation.hooks import Hooks


class Defense(Hooks):
    """Base of all defenses: a frozen keyword-only configuration that overrides the hooks it needs.

    A subclass is decorated with `pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)` and
    registered with `@DEFENSES.register("name", summary=..., paper=...)`.
    """


DEFENSES: Registry[type[Defense]] = Registry("defense")

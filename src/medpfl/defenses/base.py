"""What a defense is: hooks into the client's round, as a frozen configuration."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from medpfl.core.registry import Registry
from medpfl.federation.hooks import Hooks


class Defense(Hooks):
    """Base of all defenses: a frozen keyword-only configuration that overrides the hooks it needs.

    A subclass is decorated with `pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)` and
    registered with `@DEFENSES.register("name", summary=..., paper=...)`.
    """

    adaptive_attack: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Name and settings of the attack that knows this defense, as an entry of a spec; empty where none is needed."""


DEFENSES: Registry[type[Defense]] = Registry("defense")

"""What a defense is: hooks into the client's round, as a frozen configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from medpfl.core.mechanisms import NormKind
from medpfl.core.registry import Registry
from medpfl.federation.hooks import Hooks


@dataclass(frozen=True)
class Bound:
    """The most that what a client sends can be, by a norm of the whole update.

    unit: what can change by so much: everything that the client holds, or its only image.
    """

    value: float
    norm: NormKind
    unit: Literal["client", "image"] = "client"


@dataclass(frozen=True)
class Noise:
    """Noise that a defense adds to every trainable entry of the update: standard deviation, or Laplace's scale."""

    kind: Literal["gaussian", "laplace"]
    scale: float


class Defense(Hooks):
    """Base of all defenses: a frozen keyword-only configuration that overrides the hooks it needs.

    A subclass is decorated with `pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)` and
    registered with `@DEFENSES.register("name", summary=..., paper=...)`.
    """

    adaptive_attack: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Name and settings of the attack that knows this defense, as an entry of a spec; empty where none is needed."""

    reads_images: ClassVar[bool] = False
    """Whether `gradient` looks at the private batch again, so that it is no mere post-processing of what came before."""

    def in_round(self, number: int) -> Defense:
        """The defense as it is in the client's round with this number, counted from 0."""
        return self

    def sends_at_most(self) -> Bound | None:
        """What the update is bounded by after `update`; None if nothing bounds it."""
        return None

    def adds(self) -> Noise | None:
        """The noise that `update` adds; None if it adds none. Whether it guarantees anything is said by `guarantee`."""
        return None


DEFENSES: Registry[type[Defense]] = Registry("defense")


def registered_name(defense: Defense) -> str:
    """The name of a defense in specs; that of its class where it is not registered."""
    return next((entry.name for entry in DEFENSES if entry.item is type(defense)), type(defense).__name__)

"""What a guard is: a client's check that can stop a round, as a frozen configuration."""

from __future__ import annotations

from medpfl.core.domain import GlobalModel, Recipe
from medpfl.core.registry import Registry
from medpfl.federation.guarding import Guarding


class Guard(Guarding):
    """Base of all guards: hyper-parameters only, no state.

    A subclass is decorated with `pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)`, registered
    with `@GUARDS.register("name", summary=..., paper=..., limits=...)`, and overrides `before`, `after` or both.
    """

    def why_not(self, model: GlobalModel, recipe: Recipe) -> str | None:
        """The reason why this guard cannot look at such a model, agreed on before the round; None if it can."""
        return None


GUARDS: Registry[type[Guard]] = Registry("guard")

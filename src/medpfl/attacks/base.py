"""What an attack is: a frozen configuration and a pure function from observations to reconstructions."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import ValidationError

from medpfl.core.domain import Failure, GlobalModel, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.mechanisms import Mechanism
from medpfl.core.registry import Registry
from medpfl.core.session import NO_SESSION, Session


class Attack(ABC):
    """Base of all attacks: hyper-parameters only, no state.

    A subclass is decorated with `pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)` and
    registered with `@ATTACKS.register("name", summary=..., paper=..., limits=...)`.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    """Named settings, at least `published` and `quick`; `{name: dlg, preset: quick}` in a spec."""

    legacy_convention: ClassVar[str] = "range_1"
    """Which of `medpfl.metrics.legacy`'s conventions the source paper scored this attack with."""

    def requires(self) -> frozenset[str]:
        """Granted knowledge (keys of `KNOWLEDGE`) without which this configuration cannot run."""
        return frozenset()

    def uses(self) -> frozenset[str]:
        """Granted knowledge that this configuration reads if it is there. It sees nothing beyond these two."""
        return frozenset()

    def needs(self) -> frozenset[str]:
        """What the server must be able to change (keys of `CAPABILITIES`); nothing unless the attack crafts models."""
        return frozenset()

    def added_parameters(self, model: GlobalModel, clients: int) -> int:
        """By how many trainable entries what the server sends to one of so many clients is larger than `model`."""
        return 0

    def told(self, word: str) -> Attack | None:
        """The same attack with that knowledge (`labels`, `masks`) granted instead of inferred.

        None if it is granted already, or if there is nothing to grant: a configuration that can be told has a field of
        that name, one of whose values is `given`.
        """
        if getattr(self, word, "given") == "given":
            return None
        try:
            return dataclasses.replace(self, **{word: "given"})  # type: ignore[type-var]
        except ValidationError:
            return None

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """The reason why this attack cannot run on such a model and recipe; None if it can.

        update, examples: kind of the update and number of its images, which are known also where the recipe is
        withheld (None).
        """
        return None

    def why_not_against(
        self, mechanism: Mechanism, model: GlobalModel, recipe: Recipe | None, examples: int
    ) -> str | None:
        """The reason why this attack cannot use what it knows of such a defense; None if it can, or does not look."""
        return None

    def evaluations(self, model: GlobalModel, images: int) -> int:
        """Upper bound on gradient evaluations for one observation with that many private images."""
        return 1

    @abstractmethod
    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """One result per observation, in order. Observations share architecture, shapes and example count.

        One generator per observation: the result for an observation does not depend on its companions except through
        floating-point rounding. Breaking down on one observation gives a `Failure` in its place; finding nothing to
        read in a finite update is no failure and gives a reconstruction without images (`updates.nothing_came_back`).
        """


ATTACKS: Registry[type[Attack]] = Registry("attack")

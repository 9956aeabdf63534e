"""What a site agreed on and has: the architecture, the recipe and its own images, named by plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from medpfl.audit.validation import build
from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.errors import SpecError, suggestion
from medpfl.federation.recipes import check_recipe
from medpfl.guards.participation import WithholdLimit
from medpfl.guards.vetting import TASKS
from medpfl.models import build_model
from medpfl.models.factories import imported


class AgreedModel:
    """The parameters that name an architecture: a model of the zoo, or of a factory `package.module:callable`.

    FLARE writes a filter's parameters into a job from attributes of the same names.
    """

    def agree(self, model: str, image_shape: Sequence[int], classes: int, task: str) -> None:
        """Keeps them. Raises SpecError where they are wrong."""
        if task not in TASKS:
            raise SpecError(f"task: unknown '{task}': {suggestion(str(task), TASKS)}")
        if not isinstance(model, str) or (model and not image_shape):
            raise SpecError("model, image_shape: name the architecture that was agreed on, and the images' shape")
        self.model, self.image_shape, self.classes, self.task = model, list(image_shape), classes, task

    @cached_property
    def architecture(self) -> GlobalModel:
        """The model that was agreed on; its tensors are not used. Raises ModelError where it cannot be built."""
        return build_model(
            self.model,
            image_shape=tuple(int(side) for side in self.image_shape),
            task=TASKS[self.task](self.classes),
            generator=torch.Generator().manual_seed(0),
        )


class OwnImages:
    """The parameters that guards have besides: the site's own images, and when it stays away."""

    def own(self, images: str, images_arguments: Mapping[str, Any] | None, withheld: int, rounds: int) -> None:
        """Keeps them. Raises SpecError where they are wrong."""
        self.images, self.images_arguments = images, dict(images_arguments or {})
        self.withheld, self.rounds = withheld, rounds
        self.limit = build(WithholdLimit, {"withheld": withheld, "rounds": rounds}, "limit")

    def batch(self, site: str, number: int | None) -> Batch:
        """The site's images of a round, in the order in which it trains on them.

        `images` is called with `site`, `round` and `images_arguments`; it returns images (N, C, ...) in [0, 1] and labels.
        """
        images, labels = imported(self.images, ())(site=site, round=number, **self.images_arguments)
        return Batch(torch.as_tensor(images, dtype=torch.float32), torch.as_tensor(labels))


def agreed_recipe(recipe: Mapping[str, Any]) -> Recipe:
    """How the site trains. Raises SpecError where nobody can train so."""
    made = build(Recipe, {"update": "weights", **recipe}, "recipe")
    if problems := check_recipe(made):
        raise SpecError(f"recipe: {problems[0]}")
    return made

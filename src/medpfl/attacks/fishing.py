"""Fishing: the last layer's weights let a single image of a batch send its gradient, which is then inverted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.attacks.base import ATTACKS, Attack
from medpfl.attacks.crafted import CraftedAttack, ServerView
from medpfl.attacks.dlg import DLG
from medpfl.attacks.gradinv import GradInv
from medpfl.attacks.isolation import (
    LEAST_SIGNAL,
    Hook,
    class_hook,
    feature_hook,
    features_of,
    isolated,
    last_of,
    likeliest_alone,
    pulled,
    why_no_hook,
)
from medpfl.attacks.layers import why_no_single_input
from medpfl.attacks.updates import gradient_view, nothing_came_back, settled_at_once, why_no_readout
from medpfl.core.config import STRICT
from medpfl.core.domain import Broadcast, Failure, GlobalModel, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.errors import AttackFailure
from medpfl.core.session import NO_SESSION, Session
from medpfl.federation.recipes import has_batch_norm

SEVERAL = 1.5
"""Errors that sum to more are those of several images."""


@ATTACKS.register(
    "fishing",
    summary="chosen last layer through which one image of a batch sends its gradient, inverted by gradient matching; "
    "the architecture stays as it is",
    paper="Wen, Geiping, Fowl, Goldblum, Goldstein: Fishing for User Data in Large-Batch Federated Learning via Gradient "
    "Magnification, ICML 2022 (arXiv 2202.00580), class fishing and one-query feature fishing",
    limits="one image per round; class fishing needs a class with one image in the batch, feature fishing a batch of one "
    "class; the published search with several queries of the same batch needs several rounds and is not offered; one "
    "SGD step, no batch statistics",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Fishing(CraftedAttack):
    """`class`: all rows of the last layer are zero but that of one class, whose logit is far below the others'. Images
    of other classes have no error there, so that only this class's images send a gradient to the layers in front; how
    many there were stands in the bias. One alone has its gradient isolated exactly.

    `feature`, for a batch of one class: the class's row holds one feature, steep and with a cut at its quantile 1 / N,
    so that images above the cut are classified surely and send nothing. One image is below it with probability
    (1 - 1/N)^(N - 1). Only what that feature sees of the image is in its gradient; `features: all` cuts their sum. In a batch of several classes the other classes' images above the cut would send theirs.

    The isolated gradient is inverted as `gradinv` or `dlg` do for one image. `separate` sends the last layer with all rows zero
    to the other clients, so that their layers in front get no gradient; `joint` sends the same model to all.
    """

    by: Annotated[Literal["class", "feature"], Field(description="what singles an image out")] = "class"
    label: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=0)],
        Field(
            description="the class; auto: of which the batch most probably holds one image (class), or most (feature)"
        ),
    ] = "auto"
    mode: Annotated[
        Literal["separate", "joint"],
        Field(description="separate: the other clients' layers get no gradient; joint: all get the same model"),
    ] = "joint"
    strength: Annotated[float, Field(gt=0, description="entries of the class's row (class)")] = 0.5
    offset: Annotated[
        float, Field(gt=0, description="how far the class's logit is below the others at least (class)")
    ] = 1000.0
    features: Annotated[
        Literal["all", "one"],
        Field(description="what is cut (feature): the sum of all features, or the one that is most nearly normal"),
    ] = "all"
    sharpness: Annotated[
        float, Field(gt=0, description="steepness of the cut over the feature's standard deviation (feature)")
    ] = 300.0
    search: Annotated[
        Literal["gradinv", "dlg"],
        Field(description="how the isolated gradient is inverted; dlg is exact on many smooth models (sigmoid, tanh)"),
    ] = "gradinv"
    iterations: Annotated[
        int | None, Field(ge=1, description="steps of the inversion per start; by default as the search has it")
    ] = None
    restarts: Annotated[
        int | None, Field(ge=1, description="starts of the inversion; by default as the search has it")
    ] = None
    total_variation: Annotated[float, Field(ge=0, description="weight of total variation (gradinv)")] = 1e-2

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {"iterations": 24_000, "total_variation": 0.2, "features": "one"},
        "quick": {"iterations": 100},
    }
    legacy_convention: ClassVar[str] = "range_255_normalized"
    sends: ClassVar[str] = (
        "the agreed architecture with a chosen last layer, through which a single image of the batch sends its gradient"
    )

    def requires(self) -> frozenset[str]:
        """Auxiliary images, for the choice of the class and the feature's distribution."""
        return frozenset({"auxiliary"}) if self.by == "feature" or self.label == "auto" else frozenset()

    def needs(self) -> frozenset[str]:
        """Chosen tensors; for `separate` different ones for different clients."""
        return frozenset({"parameters"} | ({"inconsistent_models"} if self.mode == "separate" else set()))

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """A last dense layer on one vector per image, one SGD step, and no statistics of the batch."""
        if (reason := why_no_hook(model) or why_no_readout(recipe)) is not None:
            return reason
        if self.label != "auto" and self.label >= model.task.classes:
            return f"label: {self.label} is no class of this model, it has {model.task.classes}"
        if recipe is not None and recipe.local_steps * recipe.epochs > 1:
            return f"the update mixes {recipe.local_steps * recipe.epochs} local steps, the isolated gradient is one step's"
        if has_batch_norm(model) and examples > 1 and (recipe is None or recipe.batch_norm == "train"):
            return "batch norm in train mode mixes a batch's images, so no image's own gradient can be isolated"
        return why_no_single_input(model, last_of(model))

    def evaluations(self, model: GlobalModel, images: int) -> int:
        """Those of the inversion."""
        return self._inversion.evaluations(model, 1)

    def prepare(self, server_view: ServerView, generator: torch.Generator) -> Broadcast:
        """The model with the hook; draws nothing. Raises `AttackFailure` without auxiliary images where it needs them."""
        model, auxiliary = server_view.model, server_view.knowledge.auxiliary
        images = server_view.examples * (1 if self.mode == "separate" else server_view.clients)
        if auxiliary is None:
            if self.requires():
                raise AttackFailure("fishing needs auxiliary images: grant `auxiliary` and leave images for it")
            features, targets = model.parameters[last_of(model).weight][:0], torch.zeros(0, dtype=torch.int64)
        else:
            features, targets = features_of(model, auxiliary.images), auxiliary.targets
        if self.by == "class":
            label = self.label if self.label != "auto" else likeliest_alone(targets, model.task.classes, images)
            hook = class_hook(label, features, self.strength, self.offset)
        else:
            label = self.label if self.label != "auto" else int(torch.bincount(targets).argmax())
            own = features[targets == label]
            if len(own) < 2:
                raise AttackFailure(f"fishing by feature needs 2 auxiliary images of class {label}, found {len(own)}")
            hook = feature_hook(label, model.task.classes, own, images, self.sharpness, every=self.features == "all")
        models: tuple[GlobalModel, ...] = (hook.in_place_of_last(model),)
        if self.mode == "separate" and server_view.clients > 1:
            models += (Hook(label, torch.zeros_like(hook.row), 0.0).in_place_of_last(model),)
        return Broadcast(
            models, {"label": torch.tensor(label)}, (f"fished for an image of class {label} by {self.by}",)
        )

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """Isolates one gradient of every observation where it can, then inverts all of them at once."""
        results: list[Reconstruction | Failure] = []
        places: list[int] = []
        caught: list[Observation] = []
        for place, observation in enumerate(observations):
            found = self._isolated(observation)
            results.append(Failure("not inverted") if isinstance(found, Observation) else found)
            if isinstance(found, Observation):
                places.append(place)
                caught.append(found)
        if not caught:
            return results
        inverted = self._inversion.reconstruct(caught, [generators[place] for place in places], session)
        for place, result in zip(places, inverted, strict=True):
            broadcast = observations[place].broadcast
            if isinstance(result, Reconstruction) and broadcast is not None:
                result = replace(result, notes=(*broadcast.notes, *result.notes))
            results[place] = result
        return results

    @property
    def _inversion(self) -> Attack:
        budget = {"iterations": self.iterations, "restarts": self.restarts}
        given: dict[str, Any] = {name: value for name, value in budget.items() if value is not None}
        if self.search == "dlg":
            return DLG(**given)
        return GradInv(labels="given", total_variation=self.total_variation, **given)

    def _isolated(self, observation: Observation) -> Observation | Reconstruction | Failure:
        broadcast = observation.broadcast
        if broadcast is None or "label" not in broadcast.secret:
            return Failure("fishing reads the update of a model that it prepared, and this server sent another")
        if (settled := settled_at_once(observation)) is not None:
            return settled
        label = int(broadcast.secret["label"])
        known = not gradient_view(observation).notes and (self.mode == "joint" or observation.clients == 1)
        if known:
            count = pulled(observation, label)
            if count < LEAST_SIGNAL:
                return nothing_came_back(observation, f"no image of class {label} sent a gradient")
            if count > SEVERAL:
                return nothing_came_back(
                    observation, f"about {count:.0f} images of class {label} sent their gradients mixed"
                )
        return isolated(observation, label, whole=known)

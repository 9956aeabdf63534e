"""APRIL: the gradient of a position embedding gives a vision transformer's tokens away in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.attacks.base import ATTACKS, Attack
from medpfl.attacks.labels import infer_labels
from medpfl.attacks.tokens import Reading, Source, find_reading
from medpfl.attacks.updates import gradient_view, nothing_came_back, read_each, why_no_ratios
from medpfl.core.config import STRICT
from medpfl.core.domain import Failure, GlobalModel, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.session import NO_SESSION, Session


@ATTACKS.register(
    "april",
    summary="closed form for vision transformers: patches from the gradients of position embedding and first weights",
    paper="Lu, Zhang, Zhao, He, Cheng: APRIL: Finding the Achilles' Heel on Privacy for Vision Transformers, CVPR 2022 "
    "(arXiv 2112.14087), theorem 1; the same linear system for the patch embedding's weights",
    limits="one private image; a trained position embedding whose gradient is sent, wider than there are patches; SGD "
    "or plain gradients",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class April(Attack):
    """The tokens are z = E(patches) + positions, so for one image dL/dpositions = dL/dz =: A (tokens x width).

    `patch_embedding`: E is linear with weights W (width x numbers), so dL/dW = A' X, which is solved for the patches
    X by least squares. Nothing is asked of what follows.

    `attention` (the paper's): where attention is the only path from z, without norm or shortcut in front,
    sum over queries, keys, values of W' dL/dW = A' z, which is solved for z; then E is inverted. Needs no gradient of E.

    `auto` takes the first of the two that reads a random image of the attacker's own back; none: refused. Directions
    in which A is too small to divide by (`smallest`) stay mid-grey.
    """

    source: Annotated[
        Literal["auto", "patch_embedding", "attention"], Field(description="which weights' gradient is solved for")
    ] = "auto"
    smallest: Annotated[
        float, Field(ge=0, lt=1, description="singular values of the token gradients below this share are left out")
    ] = 1e-6

    presets: ClassVar[dict[str, dict[str, Any]]] = {"published": {"source": "attention"}, "quick": {}}

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """One private image, SGD, a trained position embedding, and a self-test on a random image."""
        if examples > 1:
            return f"only single images can be read, the update mixes {examples}"
        if (reason := why_no_ratios(recipe)) is not None:
            return reason
        reading = find_reading(model, self._sources(), self.smallest)
        return reading if isinstance(reading, str) else None

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """Reads every observation on its own; draws nothing."""
        readings: dict[int, Reading | str] = {}
        return read_each(observations, session, lambda _, observation: self._read(observation, readings))

    def _read(self, observation: Observation, readings: dict[int, Reading | str]) -> Reconstruction | Failure:
        model = observation.model
        if observation.examples > 1:
            return Failure(f"only single images can be read, the update mixes {observation.examples}")
        if (reason := why_no_ratios(observation.recipe)) is not None:
            return Failure(reason)
        if id(model) not in readings:
            readings[id(model)] = find_reading(model, self._sources(), self.smallest)
        reading = readings[id(model)]
        if isinstance(reading, str):
            return Failure(reading)
        view = gradient_view(observation)
        if (lost := view.why_lost(*view.tensors)) is not None:
            return nothing_came_back(observation, lost)
        found = reading.read(model, view.tensors, self.smallest)
        if not bool(torch.isfinite(found.image).all()):
            return Failure("the solution of the linear system is not finite")
        notes = (*view.notes, f"read from the weights of the {reading.source.replace('_', ' ')}")
        if found.rank < reading.tokens:
            notes = (
                *notes,
                f"the token gradients have rank {found.rank}, so {reading.tokens} tokens are not determined",
            )
        return Reconstruction(
            images=found.image[None].clamp(0.0, 1.0),
            labels=infer_labels(observation).labels,
            objective=found.residual,
            trace=((0, found.residual),),
            gradient_evaluations=0,
            stop_reason="read out in closed form",
            unclamped=found.image[None],
            notes=notes,
        )

    def _sources(self) -> tuple[Source, ...]:
        return ("patch_embedding", "attention") if self.source == "auto" else (self.source,)

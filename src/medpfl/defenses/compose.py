"""Several defenses one after the other, and what is left of their guarantees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from medpfl.core.domain import Batch, ClientState, GlobalModel, Tensors, Update
from medpfl.core.guarantees import Guarantee, Release
from medpfl.core.mechanisms import Composed, Mechanism, Unchanged
from medpfl.core.recipes import Recipe
from medpfl.defenses.base import Bound, Defense, Noise
from medpfl.defenses.clip import NO_NOISE
from medpfl.defenses.noise import NO_GUARANTEE
from medpfl.defenses.order import order_problems
from medpfl.federation.changes import with_received_statistics
from medpfl.federation.hooks import Step

REMARKS = (
    "the number of images that is sent along lies outside the guarantee",
    "buffers and counters are sent as they were received, so they tell nothing",
    "one record in place of another, instead of one whose contribution is put to zero, changes twice as much",
)


@dataclass(frozen=True)
class Composition(Defense):
    """The hooks of all parts, each in the order of the list. `compose: [{name: clip}, {name: gaussian}]` in a spec.

    The order must be that of the round: what acts on images before what acts on gradients before what acts on the update.
    Clipping with noise after it has a guarantee although neither part has one; then buffers and counters are sent as
    they were received. What follows noise and reads nothing private keeps the guarantee (post-processing).
    """

    parts: tuple[Defense, ...]

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "maximum_a_posteriori"}

    @property
    def clips_per_example(self) -> bool:  # type: ignore[override]
        """Whether a part does."""
        return any(part.clips_per_example for part in self.parts)

    @property
    def pins_agreement(self) -> bool:  # type: ignore[override]
        """Whether a part does."""
        return any(part.pins_agreement for part in self.parts)

    @property
    def changes_model(self) -> bool:
        """Whether a part does."""
        return any(part.changes_model for part in self.parts)

    def model(self, model: GlobalModel) -> GlobalModel:
        """The model after the changes of all parts."""
        for part in self.parts:
            model = part.model(model)
        return model

    def in_round(self, number: int) -> Composition:
        """All parts as they are in this round."""
        return replace(self, parts=tuple(part.in_round(number) for part in self.parts))

    def steps(self, images: int, recipe: Recipe, generator: torch.Generator) -> Sequence[Tensor] | None:
        """What the first part that chooses images chooses."""
        for part in self.parts:
            chosen = part.steps(images, recipe, generator)
            if chosen is not None:
                return chosen
        return None

    def batch(self, batch: Batch, model: GlobalModel, generator: torch.Generator) -> Batch:
        """The batch after all parts."""
        for part in self.parts:
            batch = part.batch(batch, model, generator)
        return batch

    def per_example(self, gradients: Tensors, recipe: Recipe, generator: torch.Generator) -> Tensors:
        """What the part that clips each image's gradient makes of them."""
        part = next(part for part in self.parts if part.clips_per_example)
        return part.per_example(gradients, recipe, generator)

    def gradient(self, step: Step, generator: torch.Generator) -> Tensors:
        """The step's gradient after all parts."""
        for part in self.parts:
            step = replace(step, gradients=part.gradient(step, generator))
        return step.gradients

    def update(
        self, update: Update, model: GlobalModel, state: ClientState, generator: torch.Generator
    ) -> tuple[Update, ClientState]:
        """The update after all parts, each with its own part of the state."""
        tensors: dict[str, Tensor] = {}
        for place, part in enumerate(self.parts):
            mark = f"{place}."
            own = {key.removeprefix(mark): tensor for key, tensor in state.tensors.items() if key.startswith(mark)}
            update, kept = part.update(update, model, replace(state, tensors=own), generator)
            tensors |= {f"{mark}{key}": tensor for key, tensor in kept.tensors.items()}
        if self._calibrated() is not None:
            update = with_received_statistics(update, model)
        return update, replace(state, tensors=tensors)

    def aggregated(self, update: Update, clients: int, generator: torch.Generator) -> Update:
        """The mean after what the server does for all parts."""
        for part in self.parts:
            update = part.aggregated(update, clients, generator)
        return update

    def mechanism(self) -> Mechanism:
        """The mechanisms of the parts that change something, in order."""
        found = [one for one in (part.mechanism() for part in self.parts) if not isinstance(one, Unchanged)]
        return Composed(tuple(found)) if len(found) > 1 else found[0] if found else Unchanged()

    def _calibrated(self) -> tuple[Bound, Noise] | None:
        """The first noise that comes right after a bound it suits, with that bound."""
        bound: Bound | None = None
        for part in self.parts:
            noise = part.adds()
            if noise is not None and bound is not None and (noise.kind == "gaussian" or bound.norm == "l1"):
                return bound, noise
            if part.sends_at_most() is not None:
                bound = part.sends_at_most()
            elif type(part).update is not Defense.update:
                bound = None
        return None

    def guarantee(self, recipe: Recipe, images: int) -> Guarantee | None:
        """That of a part, or that of noise after a bound. None where the order is refused."""
        if order_problems(self.parts):
            return None
        own = (part.guarantee(recipe, images) for part in self.parts)
        first = next((one for one in own if one is not None), None)
        calibrated = self._calibrated()
        if first is not None or calibrated is None:
            return first
        bound, noise = calibrated
        return Guarantee(bound.unit, "zero_out", (Release(noise.kind, noise.scale / bound.value),), remarks=REMARKS)

    def refusals(self, model: GlobalModel, recipe: Recipe) -> list[str]:
        """An order that makes no sense, then what the parts refuse."""
        return [*order_problems(self.parts), *(text for part in self.parts for text in part.refusals(model, recipe))]

    def warnings(self) -> tuple[str, ...]:
        """Those of the parts, without those that another part takes the ground from."""
        found = dict.fromkeys(text for part in self.parts for text in part.warnings())
        if self._calibrated() is not None:
            moot = {NO_NOISE, *(NO_GUARANTEE.format(noise=kind) for kind in ("Laplace", "Gaussian"))}
            return tuple(text for text in found if text not in moot)
        return tuple(found)

"""ATS decoding: the changed image is read out of the update, and then the client's operations are undone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.attacks.base import ATTACKS, Attack
from medpfl.attacks.idlg import IDLG
from medpfl.attacks.undoing import undone
from medpfl.core.config import STRICT
from medpfl.core.domain import Failure, GlobalModel, Knowledge, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.mechanisms import Augmented, Composed, Mechanism
from medpfl.core.session import NO_SESSION, Session


@ATTACKS.register(
    "ats_decoding",
    summary="iDLG finds the changed image; of all images that the known operations turn into it the likeliest is taken",
    paper="the published policies of Gao et al. (CVPR 2021) as what the attacker knows; the decoding is MedPFL's",
    limits="what operations lose (moved out, cut off, rounded) is filled in by the prior; as good as the matching is",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class ATSDecoding(Attack):
    """1. iDLG finds what the client trained on. 2. For each sequence T of the known policy the image x is searched that minimizes
    |T(x) - found|^2 / (2 s^2) - log p(x) (`undoing.undone`). 3. The sequence with the lowest is kept.

    p is learnt from auxiliary images, and total variation where there are none, which does not tell an image from its
    negative. No gradient of the model is needed for 2 and 3. Without a known defense that changes images, iDLG's own
    images come back.
    """

    iterations: Annotated[int, Field(ge=1, description="quasi-Newton steps of iDLG per start")] = 1_000
    restarts: Annotated[int, Field(ge=1, description="starts of iDLG; further ones only if all before got stuck")] = 2
    tolerance: Annotated[
        float, Field(ge=0, description="share of the update's squared norm at which iDLG's search ends")
    ] = 1e-10
    undoing_steps: Annotated[int, Field(ge=1, description="Adam steps for each sequence of operations")] = 300

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {"iterations": 6_000, "restarts": 1},
        "quick": {"iterations": 100, "undoing_steps": 100},
    }

    def uses(self) -> frozenset[str]:
        """The defense, for its operations; auxiliary images, for what images look like."""
        return frozenset({"defense", "auxiliary"})

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """What iDLG cannot attack."""
        return self._matching(None).why_not(model, recipe, update, examples)

    def why_not_against(
        self, mechanism: Mechanism, model: GlobalModel, recipe: Recipe | None, examples: int
    ) -> str | None:
        """A composition without a likelihood."""
        return self._matching(mechanism).why_not_against(mechanism, model, recipe, examples)

    def evaluations(self, model: GlobalModel, images: int) -> int:
        """Those of iDLG."""
        return self._matching(None).evaluations(model, images)

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """Both steps for every observation."""
        matching = self._matching(observations[0].knowledge.defense)
        found = matching.reconstruct(observations, generators, session)
        return [self._decoded(one, observation.knowledge) for one, observation in zip(found, observations, strict=True)]

    def _matching(self, known: Mechanism | None) -> IDLG:
        """iDLG; with the likelihood of what else the client does."""
        distance: Any = "likelihood" if isinstance(known, Composed) else "l2"
        return IDLG(
            iterations=self.iterations,
            inner_iterations=1,
            restarts=self.restarts,
            tolerance=self.tolerance,
            distance=distance,
        )

    def _decoded(self, found: Reconstruction | Failure, knowledge: Knowledge) -> Reconstruction | Failure:
        known = operations(knowledge.defense)
        if isinstance(found, Failure) or known is None or not len(found.images):
            return found
        owned = None if knowledge.auxiliary is None else knowledge.auxiliary.images
        images, places, _ = undone(found.images, known.sequences, owned, self.undoing_steps)
        told = ", then ".join(name for name, _ in known.sequences[int(places[0])])
        note = f"operations were undone, of the first image: {told}"
        return replace(found, images=images, unclamped=None, notes=(*found.notes, note))


def operations(mechanism: Mechanism | None) -> Augmented | None:
    """What is known of the operations, also as a part of a composition."""
    parts = mechanism.parts if isinstance(mechanism, Composed) else (mechanism,)
    return next((part for part in parts if isinstance(part, Augmented)), None)

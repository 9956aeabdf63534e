"""What DLG, iDLG and CPL have in common: gradients matched in L2 by L-BFGS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.attacks.base import Attack
from medpfl.attacks.labels import why_no_labels
from medpfl.attacks.matching.curvature import columns
from medpfl.attacks.matching.initialization import INITIALIZATIONS
from medpfl.attacks.matching.inversion import invert
from medpfl.attacks.matching.lbfgs import LBFGS, Preconditioner
from medpfl.attacks.matching.likelihoods import why_no_likelihood
from medpfl.attacks.matching.priors import smooth
from medpfl.attacks.matching.settings import Inversion, Labels
from medpfl.attacks.targets import Masks, target_source, why_no_targets
from medpfl.attacks.updates import why_no_scale
from medpfl.core.config import STRICT
from medpfl.core.domain import Failure, GlobalModel, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.mechanisms import Mechanism
from medpfl.core.session import NO_SESSION, Session

PUBLISHED: dict[str, Any] = {
    "iterations": 300,
    "inner_iterations": 20,
    "restarts": 1,
    "history": 100,
    "line_search": "none",
    "tolerance": 0.0,
    "patience": 6000,
    "scaled": False,
    "precision": "float32",
    "output_error": "candidate",
}
"""What DLG, iDLG and CPL have in common as published: `torch.optim.LBFGS` as it comes, 300 times, in float32.

Its early ends (20 inner steps end early when nothing changes by more than 1e-9) are left out, so this searches at
least as long as the papers' code.
"""

QUICK: dict[str, Any] = {"iterations": 30, "restarts": 1}
"""A tenth of the default budget, one start."""

RETRY_ABOVE = 1e-6
"""A start that stalls with more than this share of the update's squared norm unexplained has got stuck."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LBFGSMatching(Attack):
    """Settings and search shared by the L-BFGS attacks; a subclass names its labels and its starting points.

    An iteration is one outer step of `inner_iterations` quasi-Newton steps, as in `torch.optim.LBFGS`, which the
    papers' code calls 300 times. Every quasi-Newton step costs one gradient evaluation, plus what its line search
    tries in vain (at most a quarter more in all).

    Beyond the papers, unless `output_error` is `candidate`: the update of one image shows the output error exactly
    (`matching.output_error`), so candidates are given it; what is left is a nearly quadratic problem once it is seen
    through the Gauss-Newton matrix of a grey image (`matching.curvature`, one for all victims that share model and
    label; every column counts as an evaluation, shared by them), from starts near grey. Where the update does not
    show the error, for instance under noise or for batches, the search is the papers' own with the settings above.
    """

    iterations: Annotated[int, Field(ge=1, description="outer steps at most")] = 300
    inner_iterations: Annotated[int, Field(ge=1, description="quasi-Newton steps per outer step")] = 20
    restarts: Annotated[
        int, Field(ge=1, description="starts at most; a further one only if all before got stuck, not matched")
    ] = 2
    history: Annotated[int, Field(ge=1, description="gradient differences that L-BFGS remembers")] = 100
    line_search: Annotated[
        Literal["wolfe", "armijo", "none"],
        Field(description="wolfe, backtracking (armijo), or always the unit step (none)"),
    ] = "wolfe"
    stop_below: Annotated[float, Field(ge=0, description="objective at which the search ends")] = 0.0
    tolerance: Annotated[
        float, Field(ge=0, description="share of the update's squared norm at which the search ends")
    ] = 1e-10
    patience: Annotated[
        int, Field(ge=1, description="steps within which the objective must fall by a thousandth, or the start is over")
    ] = 50
    scaled: Annotated[
        bool, Field(description="search the distance as a share of the update's squared norm, not as it is")
    ] = True
    precision: Annotated[Literal["float64", "float32"], Field(description="arithmetic of the search")] = "float64"
    output_error: Annotated[
        Literal["observed", "candidate"],
        Field(
            description="error that gradients start from: the observed one where a single image shows it, or always"
            " the candidate's own"
        ),
    ] = "observed"
    damping: Annotated[
        float,
        Field(
            gt=0, description="share of the Gauss-Newton matrix's mean diagonal added to it, if the error is observed"
        ),
    ] = 0.1
    contrast: Annotated[
        float, Field(gt=0, le=1, description="share of a start's contrast that is kept, if the error is observed")
    ] = 0.02

    distance: Annotated[
        Literal["l2", "likelihood"],
        Field(description="squared differences, or the likelihood of the update under a known defense"),
    ] = "l2"
    total_variation: Annotated[
        float,
        Field(
            ge=0,
            description="weight of total variation, its kink rounded off, beside the distance (scaled: as a share)",
        ),
    ] = 0.0

    masks: Annotated[
        Masks,
        Field(
            description="masks of a segmentation model: searched with the images (dlg only), or the true ones (oracle)"
        ),
    ] = "joint"

    initialization: ClassVar[str] = "normal"
    label_source: ClassVar[Labels] = "inferred"

    def requires(self) -> frozenset[str]:
        """The masks, if they are to be given."""
        return frozenset({"masks"}) if self.masks == "given" else frozenset()

    def uses(self) -> frozenset[str]:
        """The defense's mechanism, for the likelihood."""
        return frozenset({"defense"}) if self.distance == "likelihood" else frozenset()

    def why_not_against(
        self, mechanism: Mechanism, model: GlobalModel, recipe: Recipe | None, examples: int
    ) -> str | None:
        """A composition without a likelihood."""
        return why_no_likelihood(mechanism, model, recipe, examples) if self.distance == "likelihood" else None

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """Labels that cannot be inferred, masks that mean nothing, and gradients of unknown scale."""
        if self.label_source == "inferred" and self.masks == "joint":  # these attacks search nothing but images
            targets = why_no_labels(model, examples)
        else:
            targets = why_no_targets(model, examples, self.label_source, self.masks)
        return targets or why_no_scale(recipe, update)

    def evaluations(self, model: GlobalModel, images: int) -> int:
        """All restarts with the longest line searches, and the Gauss-Newton matrix if nobody shares it."""
        matrix = columns(model) if self.output_error == "observed" and images == 1 else 0
        return self.restarts * self._solver().evaluations + matrix

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """Minimizes the squared distance between the candidate's and the observed gradient."""
        return invert(
            observations,
            generators,
            session,
            Inversion(
                labels=target_source(observations[0].model, self.label_source, self.masks),
                start=INITIALIZATIONS[self.initialization],
                solver=lambda setup: self._solver(setup.block, setup.preconditioner),
                distance=self.distance,
                prior=smooth(self.total_variation, "rounded"),
                precision=self.precision,
                restarts=self.restarts,
                retry_above=RETRY_ABOVE,
                goal=self.stop_below,
                relative_goal=self.tolerance,
                scaled=self.scaled,
                known_error=self.output_error == "observed",
                damping=self.damping,
                contrast=self.contrast,
            ),
        )

    def _solver(self, block: int = 1, preconditioner: Preconditioner | None = None) -> LBFGS:
        return LBFGS(
            iterations=self.iterations * self.inner_iterations,
            history=self.history,
            line_search=self.line_search,
            patience=self.patience,
            block=block,
            preconditioner=preconditioner,
        )

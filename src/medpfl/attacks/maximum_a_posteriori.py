"""Maximum a posteriori: the likelihood of a known defense with a prior learnt from images that the attacker owns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.attacks.base import ATTACKS, Attack
from medpfl.attacks.labels import why_no_labels
from medpfl.attacks.matching.adam import Adam
from medpfl.attacks.matching.initialization import GREY, Initialization, near, picture
from medpfl.attacks.matching.inversion import invert
from medpfl.attacks.matching.lbfgs import LBFGS, Preconditioner
from medpfl.attacks.matching.learnt.denoiser import STRONGEST, WEAKEST, Denoiser, learnt_denoiser
from medpfl.attacks.matching.learnt.gaussian import GaussianPrior, localized, principal_components
from medpfl.attacks.matching.learnt.terms import pull
from medpfl.attacks.matching.likelihoods import why_no_likelihood
from medpfl.attacks.matching.priors import smooth
from medpfl.attacks.matching.settings import Begun, Inversion, SearchSetup, Stage
from medpfl.attacks.matching.states import Solver
from medpfl.attacks.rehearsal import rehearsed_errors
from medpfl.attacks.updates import why_no_scale
from medpfl.core.config import STRICT
from medpfl.core.domain import Failure, GlobalModel, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.functional import total_variation
from medpfl.core.mechanisms import Mechanism
from medpfl.core.session import NO_SESSION, Session

NOISE = 0.02
"""Standard deviation of the noise around the first image that restarts differ by."""

LEARNT = ("principal_components", "covariance", "denoiser")
"""Priors that are learnt from auxiliary images."""

STEPS_DOWN = (2.5, 1.7, 1.2, 0.85)
"""Deviations that the denoiser takes off, one stage after the other, as multiples of the rehearsed error."""

FIRST_SHARE = 0.4
"""Share of the iterations that the first stage has where a denoiser follows."""

HISTORY = 50
"""Pairs that L-BFGS remembers."""

USUAL_VARIATION = 0.1
"""Total variation that images are taken to have where no auxiliary ones tell, as `total_variation` counts it."""

LEAST_VARIATION = 1e-3
"""Auxiliary images that are flatter count as this."""


@ATTACKS.register(
    "maximum_a_posteriori",
    summary="likelihood of the known defense plus a prior learnt from auxiliary images; the mode of the posterior",
    paper="likelihood and prior as in Balunovic, Dimitrov, Staab, Vechev: Bayesian Framework for Gradient Leakage, ICLR "
    "2022 (arXiv 2111.04706), equation 5; denoiser as in Zhang et al.: Plug-and-Play Image Restoration with Deep Denoiser "
    "Prior, PAMI 2021",
    limits="as good as the auxiliary images are alike; labels must be inferable; no segmentation models",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class MaximumAPosteriori(Attack):
    """1. Labels are inferred (or given, an oracle). 2. A prior is learnt from auxiliary images, and from nothing else.
    3. The images minimize

        -log p(update | images, defense) - strength * log p(images).

    The likelihood is that of the defense's mechanism (`matching.likelihoods`); where no noise is known, squared
    differences under a noise of `assumed_noise` times the update's root mean square.

    Priors: `none` and `total_variation` (neighbors differ by Laplace noise, whose scale is that of the auxiliary images,
    0.05 without any) are searched with Adam. `principal_components` (normal along the first components, one variance
    elsewhere) and `covariance` (a whole covariance, see `learnt.gaussian`) are searched with L-BFGS in the units of the
    prior, which a hundred evaluations end. `denoiser` goes on from there: in each of four stages the images are held to
    what a small network, trained to take white noise off auxiliary images, makes of the ones before, as closely as the
    covariance would know an image seen under so much noise. How much noise, it learns from a rehearsal: simulated clients
    with auxiliary images of the same label under the same defense, attacked with the first stage.

    Every evaluation counts, those of rehearsals too. Restarts differ by noise on the start, the lowest objective of the
    first stage is kept.
    """

    prior: Annotated[
        Literal["none", "total_variation", "principal_components", "covariance", "denoiser"],
        Field(description="what is assumed of images; the last three are learnt from auxiliary images"),
    ] = "covariance"
    strength: Annotated[float, Field(gt=0, description="weight of the prior's negative log density; 1 is Bayes'")] = 1.0
    iterations: Annotated[int, Field(ge=1, description="steps per restart, over all stages, without rehearsals")] = 250
    restarts: Annotated[int, Field(ge=1, description="starts, the one with the highest posterior is kept")] = 1
    learning_rate: Annotated[float, Field(gt=0, description="step of Adam, for priors that are searched with it")] = (
        0.05
    )
    components: Annotated[
        int, Field(ge=1, description="principal components at most; never more than half of the images")
    ] = 60
    denoiser_steps: Annotated[int, Field(ge=1, description="training steps of the denoiser")] = 600
    denoiser_width: Annotated[int, Field(ge=4, description="channels of the denoiser at full size")] = 24
    rehearsals: Annotated[int, Field(ge=1, description="auxiliary clients that are attacked before (denoiser)")] = 3
    assumed_noise: Annotated[
        float, Field(gt=0, description="noise where none is known, as a share of the update's root mean square")
    ] = 1e-2
    labels: Annotated[
        Literal["inferred", "given"], Field(description="inferred from the update, or the true ones (oracle)")
    ] = "inferred"
    precision: Annotated[Literal["float32", "float64"], Field(description="arithmetic of the search")] = "float32"

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {"prior": "total_variation", "iterations": 1000},
        "quick": {"iterations": 60},
    }

    def requires(self) -> frozenset[str]:
        """Auxiliary images for learnt priors; the labels, if they are to be given."""
        learnt = {"auxiliary"} if self.prior in LEARNT else set()
        return frozenset(learnt | ({"labels"} if self.labels == "given" else set()))

    def uses(self) -> frozenset[str]:
        """The defense's mechanism and auxiliary images."""
        return frozenset({"defense", "auxiliary"})

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """Segmentation models, labels that cannot be inferred, gradients of unknown scale."""
        if model.task.name == "segmentation":
            return "a segmentation model is trained with masks, and this attack infers labels only"
        no_labels = why_no_labels(model, examples) if self.labels == "inferred" else None
        return no_labels or why_no_scale(recipe, update)

    def why_not_against(
        self, mechanism: Mechanism, model: GlobalModel, recipe: Recipe | None, examples: int
    ) -> str | None:
        """A composition without a likelihood."""
        return why_no_likelihood(mechanism, model, recipe, examples)

    def evaluations(self, model: GlobalModel, images: int) -> int:
        """All stages of all restarts to the end, and the rehearsals."""
        if self.prior in ("none", "total_variation"):
            return self.restarts * (self.iterations + 1)
        first, *others = [self._lbfgs(stage).evaluations for stage in range(len(self._steps()))]
        return self.restarts * first * (1 + (self.rehearsals if others else 0)) + sum(others)

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """Maximizes the posterior density of every observation's images."""
        auxiliary = observations[0].knowledge.auxiliary
        if self.prior not in LEARNT:
            variation = USUAL_VARIATION if auxiliary is None else float(total_variation(auxiliary.images).mean())
            return invert(observations, generators, session, self._with_adam(observations[0], variation))
        if auxiliary is None:
            return [Failure("auxiliary images were not granted")] * len(observations)
        prior = self._learnt(auxiliary.images).to(next(iter(observations[0].model.parameters.values())).to(self._dtype))
        alone = self._with_lbfgs(prior)
        if self.prior != "denoiser":
            return invert(observations, generators, session, alone)
        rehearsed = rehearsed_errors(observations, self.rehearsals, alone)
        errors = torch.tensor([error for error, _ in rehearsed], dtype=self._dtype)
        net = learnt_denoiser(auxiliary.images, self.denoiser_steps, self.denoiser_width)
        further = tuple(self._held_to(prior, net, share * errors) for share in STEPS_DOWN)
        results = invert(observations, generators, session, replace(alone, stages=(*alone.stages, *further)))
        return [
            one
            if isinstance(one, Failure) or not len(one.images)
            else replace(one, gradient_evaluations=one.gradient_evaluations + spent)
            for one, (_, spent) in zip(results, rehearsed, strict=True)
        ]

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "float64" else torch.float32

    def _learnt(self, images: Tensor) -> GaussianPrior:
        return (
            principal_components(images, self.components) if self.prior == "principal_components" else localized(images)
        )

    def _steps(self) -> tuple[int, ...]:
        """Iterations of each stage."""
        if self.prior != "denoiser":
            return (self.iterations,)
        first = max(1, int(FIRST_SHARE * self.iterations))
        return (first, *(max(1, (self.iterations - first) // len(STEPS_DOWN)) for _ in STEPS_DOWN))

    def _plain(self, start: Initialization, solver: Callable[[SearchSetup], Solver]) -> Inversion:
        """The likelihood alone."""
        return Inversion(
            labels=self.labels,
            start=start,
            solver=solver,
            distance="likelihood",
            precision=self.precision,
            restarts=self.restarts,
            assumed_noise=self.assumed_noise,
        )

    def _with_adam(self, observation: Observation, variation: float) -> Inversion:
        """One search for priors without curvature. variation: the usual total variation of images.

        Neighbors differ by Laplace noise: such an image has one nat for each of its pixels.
        """
        pixels = observation.examples * prod(observation.model.image_shape)
        weight = self.strength * pixels / max(variation, LEAST_VARIATION) if self.prior == "total_variation" else 0.0
        return replace(self._plain(near(GREY, NOISE), self._adam), prior=smooth(weight))

    def _adam(self, setup: SearchSetup) -> Adam:
        return Adam(
            layout=setup.layout,
            iterations=self.iterations,
            learning_rate=self.learning_rate,
            scale=(1.0,) * setup.layout.images[1],
            signed=False,
            schedule="cosine",
            block=setup.block,
        )

    def _with_lbfgs(self, prior: GaussianPrior) -> Inversion:
        """The first stage: images are held to the prior's mean."""
        mean = prior.flat(prior.mean[None])

        def first(_points: Tensor | None, setup: SearchSetup) -> Begun:
            centers = mean.repeat(1, setup.layout.images[0])
            term, precondition = pull(prior, setup.layout, centers, None, self.strength)
            return Begun(term, self._lbfgs(0, setup.block, precondition))

        start = picture(mean.reshape(prior.shape), NOISE)
        return replace(self._plain(start, lambda setup: self._lbfgs(0, setup.block)), stages=(first,))

    def _held_to(self, prior: GaussianPrior, net: Denoiser, deviations: Tensor) -> Stage:
        """A stage in which images are held to what is left of them when noise of these deviations (V,) is taken off."""

        def stage(points: Tensor | None, setup: SearchSetup) -> Begun:
            assert points is not None  # a stage came before
            own = deviations[list(setup.places)].clamp(WEAKEST, STRONGEST).to(points)
            layout = setup.layout
            images = points[:, : layout.pixels].reshape(-1, *layout.images[1:])
            cleaned = net(images.float(), own.repeat_interleave(layout.images[0]).float()).to(points)
            centers = cleaned.reshape(len(points), -1)
            term, precondition = pull(prior, layout, centers, own, self.strength)
            return Begun(term, self._lbfgs(1, setup.block, precondition))

        return stage

    def _lbfgs(self, stage: int, block: int = 1, preconditioner: Preconditioner | None = None) -> LBFGS:
        return LBFGS(self._steps()[stage], history=HISTORY, block=block, preconditioner=preconditioner)

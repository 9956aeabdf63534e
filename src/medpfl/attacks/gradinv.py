"""GradInv (Inverting Gradients): cosine matching with total variation, signed Adam and restarts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.attacks.base import ATTACKS, Attack
from medpfl.attacks.matching.adam import Adam
from medpfl.attacks.matching.initialization import GREY, input_units, near, normalized_start
from medpfl.attacks.matching.inversion import invert
from medpfl.attacks.matching.likelihoods import why_no_likelihood
from medpfl.attacks.matching.objectives import SCALE_FREE
from medpfl.attacks.matching.priors import smooth
from medpfl.attacks.matching.settings import Inversion, SearchSetup
from medpfl.attacks.targets import Masks, target_source, why_no_targets
from medpfl.attacks.updates import why_no_scale
from medpfl.core.config import STRICT
from medpfl.core.domain import Failure, GlobalModel, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.mechanisms import Mechanism
from medpfl.core.session import NO_SESSION, Session
from medpfl.federation.recipes import has_batch_norm

NOISE = 0.02
"""Standard deviation of the noise around middle grey that restarts differ by."""

TOP_TENSORS = 10
"""Tensors that `layers: top10` matches."""

UNTRAINED: dict[str, Any] = {"layers": "top10", "total_variation": 1e-6, "median_filter_every": 500}
TRAINED: dict[str, Any] = {"layers": "all", "total_variation": 1e-1, "median_filter_every": 0}
PAPER: dict[str, Any] = {
    "iterations": 24_000,
    "restarts": 8,
    "patience": 0,
    "labels": "given",
    "distance": "cosine",
    "start": "normal",
    "schedule": "steps",
    "output_error": "candidate",
}


@ATTACKS.register(
    "gradinv",
    summary="cosine distance plus total variation, signed Adam with boxing, best of several restarts",
    paper="Geiping, Bauermeister, Droege, Moeller: Inverting Gradients - How easy is it to break privacy in federated "
    "learning?, NeurIPS 2020 (arXiv 2003.14053), equation 4",
    limits="needs many iterations; results on trained models and large batches are weak",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class GradInv(Attack):
    """1. Labels are inferred (or given, an oracle). 2. Images start near middle grey. 3. Signed Adam on

        1 - cosine(gradient(images, labels), observed gradient) + total_variation * TV(images),

    images kept in [0, 1], the learning rate falling along half a cosine. 4. The restart with the lowest objective is
    kept. Starts and steps are in units of the model's normalized input where it normalizes.

    Beyond the paper, which takes one cosine over all tensors, starts from normal noise, and divides the learning rate
    by ten after 3/8, 5/8 and 7/8 of the iterations: on nets with batch norm, `layer_cosine` takes one cosine per tensor and
    weights them by the tensors' sizes (on nets without it came out worse than one cosine over all). The many weights of deep layers hold most of what there is to know about an image, while the norm of
    a trained net's gradient may lie in its few first weights. Where the update shows the output error of its single image
    exactly (`matching.output_error`), candidates are given it, and tensors are compared in length too, which noise or
    the candidate's own error would spoil. benchmarks/gradinv_quality.py measures what this brings.

    The presets `published` (MedPFL's runs on an untrained model) and `published_trained` are the paper's search. They
    differ in the tensors that are matched, the weight of total variation and the median filter.

    Segmentation models have masks in place of labels, searched with the images as logits per pixel unless they are given.

    TV is measured on images in [0, 1]. The authors' code measures it on the normalized input, where the same weight
    counts 1 / standard deviation times as much; a model without normalization makes no difference between the two.
    """

    iterations: Annotated[int, Field(ge=1, description="Adam steps per restart")] = 1_000
    restarts: Annotated[int, Field(ge=1, description="starts, the one with the lowest objective is kept")] = 1
    learning_rate: Annotated[float, Field(gt=0, description="step of Adam, in units of the normalized input")] = 0.1
    total_variation: Annotated[
        float, Field(ge=0, description="weight of total variation on [0, 1]; authors' code: on the normalized input")
    ] = 1e-2
    layers: Annotated[
        Literal["all", "top10"], Field(description="match all tensors, or the ten with the largest observed norm")
    ] = "all"
    median_filter_every: Annotated[
        int, Field(ge=0, description="iterations between two 3x3 median filters of the images, 0 for none")
    ] = 0
    labels: Annotated[
        Literal["inferred", "given"], Field(description="inferred from the update, or the true ones (oracle)")
    ] = "inferred"
    masks: Annotated[
        Masks,
        Field(description="masks of a segmentation model: searched with the images, or the true ones (oracle)"),
    ] = "joint"
    signed: Annotated[bool, Field(description="use only the signs of the objective's derivative")] = True
    patience: Annotated[
        int, Field(ge=0, description="iterations without a fall of the objective that end a restart, 0 for never")
    ] = 500
    distance: Annotated[
        Literal["auto", "cosine", "layer_cosine", "l2", "l1", "likelihood"],
        Field(
            description="one cosine over all tensors, or a weighted mean of one cosine per tensor (auto: this one for"
            " models with batch norm); squared or absolute differences; or the likelihood under a known defense's noise"
        ),
    ] = "auto"
    size_power: Annotated[
        float, Field(ge=0, description="with layer_cosine, a tensor counts as its number of entries to this power")
    ] = 0.75
    start: Annotated[
        Literal["normal", "grey"], Field(description="normal noise, or middle grey with a trace of it")
    ] = "grey"
    schedule: Annotated[
        Literal["steps", "cosine"],
        Field(description="learning rate: divided by ten three times, or falling along half a cosine"),
    ] = "cosine"
    output_error: Annotated[
        Literal["observed", "candidate"],
        Field(
            description="error that gradients start from: the observed one where a single image shows it, then compared"
            " in length too by layer_cosine; or always the candidate's own"
        ),
    ] = "observed"
    precision: Annotated[Literal["float32", "float64"], Field(description="arithmetic of the search")] = "float32"

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {**PAPER, **UNTRAINED},
        "published_trained": {**PAPER, **TRAINED},
        "quick": {"iterations": 100, "restarts": 1},
    }
    legacy_convention: ClassVar[str] = "range_255_normalized"

    def requires(self) -> frozenset[str]:
        """The labels or the masks, if they are to be given."""
        return frozenset({name for name in ("labels", "masks") if getattr(self, name) == "given"})

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """Labels that cannot be inferred, labels of a model that is trained with masks, and masks of one that is not.

        For distances other than cosines, gradients of unknown scale.
        """
        scale = None if self.distance in {"auto", *SCALE_FREE} else why_no_scale(recipe, update)
        return scale or why_no_targets(model, examples, self.labels, self.masks)

    def uses(self) -> frozenset[str]:
        """The defense's mechanism, for the likelihood."""
        return frozenset({"defense"}) if self.distance == "likelihood" else frozenset()

    def why_not_against(
        self, mechanism: Mechanism, model: GlobalModel, recipe: Recipe | None, examples: int
    ) -> str | None:
        """A composition without a likelihood."""
        return why_no_likelihood(mechanism, model, recipe, examples) if self.distance == "likelihood" else None

    def evaluations(self, model: GlobalModel, images: int) -> int:
        """All restarts to the end."""
        return self.restarts * (self.iterations + 1)

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """Minimizes the angle between the candidate's and the observed gradient plus the prior."""
        model = observations[0].model
        mean, std = input_units(model)
        distance = self.distance
        if distance == "auto":
            distance = "layer_cosine" if has_batch_norm(model) else "cosine"
        return invert(
            observations,
            generators,
            session,
            Inversion(
                labels=target_source(model, self.labels, self.masks),
                start=normalized_start(mean, std) if self.start == "normal" else near(GREY, NOISE),
                solver=lambda setup: self._solver(setup, std),
                distance=distance,
                size_power=self.size_power,
                known_error=self.output_error == "observed",
                distance_with_error="layer_cosine_and_norm" if distance == "layer_cosine" else None,
                precision=self.precision,
                restarts=self.restarts,
                largest_tensors=TOP_TENSORS if self.layers == "top10" else None,
                prior=smooth(self.total_variation),
            ),
        )

    def _solver(self, setup: SearchSetup, std: tuple[float, ...]) -> Adam:
        return Adam(
            layout=setup.layout,
            iterations=self.iterations,
            learning_rate=self.learning_rate,
            scale=std,
            signed=self.signed,
            schedule=self.schedule,
            median_filter_every=self.median_filter_every,
            patience=self.patience,
            block=setup.block,
        )

"""GradInversion: squared gradient distance, image priors, batch-norm statistics, and restarts that agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.attacks.base import ATTACKS, Attack
from medpfl.attacks.batch_statistics import StatisticsSource, why_not_recovered
from medpfl.attacks.matching.adam import Adam
from medpfl.attacks.matching.initialization import input_units, normalized_start
from medpfl.attacks.matching.inversion import invert
from medpfl.attacks.matching.priors import VariationForm, small, smooth, together
from medpfl.attacks.matching.settings import Group, Inversion, SearchSetup
from medpfl.attacks.targets import Masks, target_source, why_no_targets
from medpfl.attacks.updates import why_no_scale
from medpfl.core.config import STRICT
from medpfl.core.domain import Failure, GlobalModel, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.session import NO_SESSION, Session

ORACLE = "batch_norm_statistics"


@ATTACKS.register(
    "gradinversion",
    summary="squared gradient distance, total variation, L2 and batch-norm statistics; restarts are pulled together",
    paper="Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov: See through Gradients - Image Batch Recovery via "
    "GradInversion, CVPR 2021 (arXiv 2104.07586), section 3",
    limits="needs many iterations and restarts; its strongest prior needs batch norm in train mode and sent buffers",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class GradInversion(Attack):
    """1. Labels are inferred (or given, an oracle). 2. Every restart's images start as normal noise. 3. Adam with
    warm-up, a cosine schedule and Gaussian noise on every step, all restarts of a victim side by side, on

        gradient * |gradient(images, labels) - observed gradient|^2 / |observed gradient|^2
        + total_variation * TV(images) + l2 * mean square of the model's input
        + batch_norm * sum over batch norm layers of (|mean - expected mean| + |variance - expected variance|)
        + group * mean square of (images - consensus of the victim's restarts),

    images kept in [0, 1]. 4. The restart with the lowest objective is kept.

    The consensus is the mean over restarts after each image is registered to it by a rigid translation; the paper
    registers with a flow network. Images of restarts are matched with each other first (`matching.coupling`).

    Where the expected statistics come from is a knowledge of its own: `given` (the exact ones of the private batch, an
    oracle; what the paper's main results assume), `recovered` exactly from the buffers in the update, `running` (those
    of the model that was sent), `none`, or `auto`, the best of these that the observation shows. The reconstruction's
    notes say which one was used. Nets without batch norm are attacked without this term.

    Unlike the paper: labels may repeat in a batch (the paper's rule needs unique ones); the squared norm of the
    observed gradient is divided out unless `relative` is false; TV and group term are means on images in [0, 1].
    """

    iterations: Annotated[int, Field(ge=1, description="Adam steps per restart")] = 2_000
    restarts: Annotated[
        int, Field(ge=1, description="starts side by side, the group; the lowest objective is kept")
    ] = 4
    learning_rate: Annotated[
        float, Field(gt=0, description="highest step of Adam, in units of the normalized input")
    ] = 0.1
    warm_up: Annotated[int, Field(ge=0, description="iterations over which the learning rate rises")] = 50
    noise: Annotated[
        float, Field(ge=0, description="standard deviation of the noise on every step, as a share of the learning rate")
    ] = 0.01
    gradient: Annotated[float, Field(gt=0, description="weight of the squared gradient distance")] = 1.0
    relative: Annotated[
        bool, Field(description="divide the squared gradient distance by the update's squared norm")
    ] = True
    total_variation: Annotated[float, Field(ge=0, description="weight of total variation on [0, 1]")] = 0.3
    variation_form: Annotated[
        VariationForm, Field(description="absolute differences along the axes, or lengths of their vectors")
    ] = "absolute"
    l2: Annotated[float, Field(ge=0, description="weight of the mean square of the model's input")] = 1e-6
    batch_norm: Annotated[float, Field(ge=0, description="weight of the batch-norm statistics")] = 1.0
    first_layer: Annotated[
        float, Field(ge=0, description="how many times as much the first batch norm layer counts")
    ] = 10.0
    batch_norm_statistics: Annotated[
        StatisticsSource, Field(description="where the expected batch-norm statistics come from")
    ] = "auto"
    group: Annotated[float, Field(ge=0, description="weight of the group term, 0 for independent restarts")] = 0.1
    registration: Annotated[
        Literal["translation", "none"], Field(description="how images are registered before they are averaged")
    ] = "translation"
    consensus_every: Annotated[int, Field(ge=1, description="iterations between two renewals of the consensus")] = 10
    labels: Annotated[
        Literal["inferred", "given"], Field(description="inferred from the update, or the true ones (oracle)")
    ] = "inferred"
    masks: Annotated[
        Masks,
        Field(description="masks of a segmentation model: searched with the images, or the true ones (oracle)"),
    ] = "joint"
    patience: Annotated[
        int, Field(ge=0, description="iterations without a fall of the objective that end a restart, 0 for never")
    ] = 0
    precision: Annotated[Literal["float32", "float64"], Field(description="arithmetic of the search")] = "float32"

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {
            "iterations": 20_000,
            "restarts": 8,
            "noise": 0.2,
            "gradient": 1e-3,
            "relative": False,
            "total_variation": 1e-4,
            "l2": 1e-6,
            "batch_norm": 0.1,
            "group": 0.01,
        },
        "quick": {"iterations": 100, "restarts": 2},
    }
    legacy_convention: ClassVar[str] = "range_255_normalized"

    def requires(self) -> frozenset[str]:
        """Labels, masks and statistics, if they are to be given."""
        targets = {name for name in ("labels", "masks") if getattr(self, name) == "given"}
        return frozenset(targets | ({ORACLE} if self.batch_norm_statistics == "given" else set()))

    def uses(self) -> frozenset[str]:
        """Granted statistics, where the best ones are taken."""
        return frozenset({ORACLE}) if self.batch_norm_statistics == "auto" else frozenset()

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """Labels that cannot be inferred, gradients of unknown scale, and statistics that no update can show."""
        targets = why_no_targets(model, examples, self.labels, self.masks)
        hidden = why_not_recovered(model, recipe) if self.batch_norm_statistics == "recovered" else None
        return targets or why_no_scale(recipe, update) or hidden

    def evaluations(self, model: GlobalModel, images: int) -> int:
        """All restarts to the end."""
        return self.restarts * (self.iterations + 1)

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """Minimizes the sum of all terms for all restarts side by side."""
        model = observations[0].model
        mean, std = input_units(model)
        group = Group(self.group, self.consensus_every, self.registration == "translation")
        return invert(
            observations,
            generators,
            session,
            Inversion(
                labels=target_source(model, self.labels, self.masks),
                start=normalized_start(mean, std),
                solver=lambda setup: self._solver(setup, std),
                distance="l2",
                precision=self.precision,
                restarts=self.restarts,
                scaled=self.relative,
                gradient_weight=self.gradient,
                prior=together(smooth(self.total_variation, self.variation_form), small(self.l2, mean, std)),
                statistics=self.batch_norm_statistics,
                statistics_weight=self.batch_norm,
                first_layer=self.first_layer,
                group=group if self.group and self.restarts > 1 else None,
            ),
        )

    def _solver(self, setup: SearchSetup, std: tuple[float, ...]) -> Adam:
        return Adam(
            layout=setup.layout,
            iterations=self.iterations,
            learning_rate=self.learning_rate,
            scale=std,
            signed=False,
            schedule="cosine",
            warm_up=self.warm_up,
            noise=self.noise,
            source=setup.noise,
            patience=self.patience,
            block=setup.block,
        )

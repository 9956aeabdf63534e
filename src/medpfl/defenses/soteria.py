"""Soteria: the classifier's gradient is cut off where features say most about the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.domain import GlobalModel, Recipe, Tensors
from medpfl.core.mechanisms import MaskedFeatures, Mechanism
from medpfl.defenses.base import DEFENSES, Defense
from medpfl.federation.hooks import Step
from medpfl.models.bottleneck import classifier, what_reaches

CHUNK = 64
"""Features whose derivatives are computed at once."""

TINY = 1e-10


@DEFENSES.register(
    "soteria",
    summary="columns of the classifier's weight gradient are zero for features that are large beside what moves them",
    paper="Sun et al.: Soteria: Provable Defense Against Privacy Leakage in Federated Learning From Representation "
    "Perspective, CVPR 2021 (arXiv 2012.06043), section 4",
    limits="the bias and every other layer are sent as they are, so an attacker who leaves the masked columns out sees as "
    "much as before; one derivative per feature and image; no privacy guarantee",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Soteria(Defense):
    """With features r = what reaches the classifier, |dr_f / dx| / |r_f| is computed for every feature f and image x. The
    columns of the classifier's weight gradient whose mean ratio is below the percentile become zero.

    The authors' code prunes 1 percent against DLG and 60 percent against GradInv.
    """

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "gradinv", "distance": "likelihood"}
    reads_images: ClassVar[bool] = True

    percentile: Annotated[
        float, Field(gt=0, lt=100, description="percentage of features whose columns become zero")
    ] = 60.0

    def gradient(self, step: Step, generator: torch.Generator) -> Tensors:
        """The gradient with the classifier's masked."""
        path = classifier(step.model)
        if path is None or not len(step.batch):
            return step.gradients
        ratios = feature_ratios(step.model, path, step.batch.images)
        kept = ratios >= torch.quantile(ratios, self.percentile / 100)
        name = f"{path}.weight"
        return {**step.gradients, name: step.gradients[name] * kept.to(step.gradients[name])}

    def mechanism(self) -> Mechanism:
        """Masked columns."""
        return MaskedFeatures(self.percentile)

    def refusals(self, model: GlobalModel, recipe: Recipe) -> list[str]:
        """Models without a dense classifier."""
        if classifier(model) is None:
            return [
                f"soteria masks the features of a dense classifier, and '{model.name}' has none; use another defense"
            ]
        return []

    def warnings(self) -> tuple[str, ...]:
        """No guarantee."""
        return (
            "Soteria masks one layer and leaves all others as they are: there is no formal guarantee, and attackers who "
            "leave the masked columns out lose nothing else",
        )


def feature_ratios(model: GlobalModel, path: str, images: Tensor) -> Tensor:
    """|dr_f / dx| / |r_f| of the features (K,) that reach the layer at `path`, mean over images (N, C, *spatial)."""

    def features(image: Tensor) -> Tensor:
        with what_reaches(model, path) as seen:
            model.forward(image[None])
        return seen[-1].flatten()

    total = torch.zeros((), device=images.device)
    for image in images:
        found, pullback, *_ = torch.func.vjp(features, image)
        basis = torch.eye(found.numel(), dtype=found.dtype, device=found.device)
        (derivatives,) = torch.func.vmap(pullback, chunk_size=CHUNK)(basis)
        total = total + derivatives.flatten(1).norm(dim=1) / (found.abs() + TINY)
    return total / len(images)

"""ATS: training images are changed by operations that were searched to make gradients match badly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.mechanisms import Augmented, Mechanism
from medpfl.defenses.augmentations import TABLE, applied, parse_policy
from medpfl.defenses.base import DEFENSES, Defense

POINTS = 21
"""Points on the way from noise to the image at which gradients are compared."""


@DEFENSES.register(
    "ats",
    summary="every training image is changed by one of a few sequences of operations: turned, moved, inverted, ...",
    paper="Gao et al.: Privacy-preserving Collaborative Learning with Automatic Transformation Search, CVPR 2021 "
    "(arXiv 2011.12505)",
    limits="the numbering of the authors' fifty operations was not found, so policies have numbers of the table here; "
    "who knows the policy undoes it (ats_decoding); attacks early in training break it; images with two axes only; no "
    "guarantee",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class ATS(Defense):
    """Each image of a batch draws one sequence of the policy and goes through its operations; labels are kept.

    `privacy_score` is the search's own measure, for those who search a policy for their model and data.
    """

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "ats_decoding"}

    policy: Annotated[
        str,
        Field(description="sequences of operations by number (`augmentations.TABLE`), divided by +: 3-1-7+43-18-18"),
    ] = "4-36-46+14-39-26"

    def __post_init__(self) -> None:
        """A policy that cannot be read is refused at once."""
        parse_policy(self.policy)

    def batch(self, batch: Batch, model: GlobalModel, generator: torch.Generator) -> Batch:
        """The changed images."""
        sequences = parse_policy(self.policy)
        chosen = torch.randint(len(sequences), (len(batch),), generator=generator)
        images = [
            applied(image[None], sequences[int(place)]) for image, place in zip(batch.images, chosen, strict=True)
        ]
        return Batch(torch.cat(images) if images else batch.images, batch.targets)

    def mechanism(self) -> Mechanism:
        """The sequences."""
        return Augmented(tuple(tuple(TABLE[number] for number in one) for one in parse_policy(self.policy)))

    def refusals(self, model: GlobalModel, recipe: Recipe) -> list[str]:
        """Volumes, masks."""
        if len(model.image_shape) != 3:
            return [f"ats changes images with two axes, found {len(model.image_shape) - 1}; use another defense"]
        if model.task.name == "segmentation":
            return ["ats moves images but not their masks; use another defense for segmentation"]
        return []

    def warnings(self) -> tuple[str, ...]:
        """No guarantee."""
        return (
            "ATS changes what is trained on, not what gradients show of it: there is no formal guarantee, and a changed "
            "image may still show the patient",
        )


def privacy_score(
    model: GlobalModel, images: Tensor, targets: Tensor, policy: str, generator: torch.Generator
) -> float:
    """Area under the similarity of gradients on the way from uniform noise to the changed image; the lower the better.

    At every point the mean over tensors of the cosine with the changed image's gradient, by the trapezoid rule, mean
    over images (N, C, height, width) (Gao et al. 2021, section 4.2).
    """
    sequences, areas = parse_policy(policy), []
    for image, target in zip(images, targets, strict=True):
        place = int(torch.randint(len(sequences), (1,), generator=generator))
        goal = applied(image[None], sequences[place])
        noise = torch.rand(goal.shape, generator=generator, dtype=torch.float64).to(goal)
        wanted = _gradient(model, goal, target)
        shares = torch.linspace(0.0, 1.0, POINTS).to(goal)
        similar = [_similarity(_gradient(model, noise + share * (goal - noise), target), wanted) for share in shares]
        areas.append(torch.trapezoid(torch.stack(similar), shares))
    return float(torch.stack(areas).mean())


def _gradient(model: GlobalModel, image: Tensor, target: Tensor) -> list[Tensor]:
    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return model.task.loss(model.forward(image, parameters=parameters)[0], target[None])

    return list(torch.func.grad(loss)(dict(model.parameters)).values())


def _similarity(found: list[Tensor], wanted: list[Tensor]) -> Tensor:
    cosines = [
        torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        for a, b in zip(found, wanted, strict=True)
    ]
    return torch.stack(cosines).mean()

"""Mixture decoding: mixtures are read out of the update, and then taken apart into images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.attacks.base import ATTACKS, Attack
from medpfl.attacks.matching.adam import Adam
from medpfl.attacks.matching.initialization import GREY, near
from medpfl.attacks.matching.inversion import invert
from medpfl.attacks.matching.priors import smooth
from medpfl.attacks.matching.settings import Inversion
from medpfl.core.config import STRICT
from medpfl.core.domain import Failure, GlobalModel, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.mechanisms import Composed, Mechanism, Mixtures
from medpfl.core.session import NO_SESSION, Session

SPREAD = 0.02
"""Standard deviation of the noise around grey that images start with."""

RATE = 0.05
"""Step of the decoding, in pixels and in logits of weights."""


@ATTACKS.register(
    "mixture_decoding",
    summary="mixtures with soft labels are found by gradient matching, and split into images and weights afterwards",
    paper="the two steps of Huang et al.: Evaluating Gradient Inversion Attacks and Defenses, NeurIPS 2021 "
    "(arXiv 2112.00059), with weights and partners searched too, as Carlini et al. (arXiv 2011.05315) do by other means",
    limits="of one batch there are as many mixtures as images, which leaves much open; the published decodings are given "
    "weights and partners, or see many encodings of the same image",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixtureDecoding(Attack):
    """1. Mixtures E and their soft labels: Adam on 1 - cosine + total variation. 2. Images P in [0, 1] and weights W, rows
    of a softmax, that minimize |E - W P|^2 + total variation, of pixels with random signs ||2 E - 1| - |2 W P - 1||^2.

    Images are ranked by their summed weights. Without a known defense that mixes, the mixtures themselves come back.
    """

    iterations: Annotated[int, Field(ge=1, description="Adam steps of the gradient matching")] = 1_000
    learning_rate: Annotated[float, Field(gt=0, description="step of the gradient matching")] = 0.05
    total_variation: Annotated[float, Field(ge=0, description="weight of total variation in both parts")] = 1e-2
    decoding_steps: Annotated[int, Field(ge=1, description="Adam steps of the decoding")] = 500

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {"iterations": 10_000, "decoding_steps": 1_000},
        "quick": {"iterations": 100, "decoding_steps": 100},
    }

    def uses(self) -> frozenset[str]:
        """The defense: how many images are in a mixture, and whether signs are random."""
        return frozenset({"defense"})

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """Segmentation models, whose masks are mixed too."""
        if model.task.name == "segmentation":
            return "mixtures of masks are not taken apart; use gradinv"
        return None

    def evaluations(self, model: GlobalModel, images: int) -> int:
        """Those of the gradient matching; the decoding needs no gradient of the model."""
        return self.iterations + 1

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """Both steps for every observation."""
        found = invert(
            observations,
            generators,
            session,
            Inversion(
                labels="soft",
                start=near(GREY, SPREAD),
                solver=lambda setup: Adam(
                    layout=setup.layout,
                    iterations=self.iterations,
                    learning_rate=self.learning_rate,
                    scale=(1.0,) * setup.layout.images[1],
                    signed=True,
                    schedule="cosine",
                    block=setup.block,
                ),
                distance="cosine",
                precision="float32",
                restarts=1,
                prior=smooth(self.total_variation),
            ),
        )
        return [
            self._decoded(one, mixing(observation.knowledge.defense), stream)
            for one, observation, stream in zip(found, observations, generators, strict=True)
        ]

    def _decoded(
        self, found: Reconstruction | Failure, known: Mixtures | None, generator: torch.Generator
    ) -> Reconstruction | Failure:
        if isinstance(found, Failure) or known is None or len(found.images) < 2:
            return found
        images, weights, error = taken_apart(found.images, known, self.decoding_steps, self.total_variation, generator)
        order = weights.sum(dim=0).argsort(descending=True)
        labels = found.labels
        if labels is not None and labels.is_floating_point() and labels.ndim == 2:
            labels = (weights.T @ labels.to(weights))[order]
        elif labels is not None:
            labels = labels[weights.argmax(dim=0)][order]
        note = f"{len(images)} images and their weights explain the mixtures to a mean squared error of {error:.2g}"
        return replace(found, images=images[order], unclamped=None, labels=labels, notes=(*found.notes, note))


def mixing(mechanism: Mechanism | None) -> Mixtures | None:
    """What is known of the mixtures, also as a part of a composition."""
    parts = mechanism.parts if isinstance(mechanism, Composed) else (mechanism,)
    return next((part for part in parts if isinstance(part, Mixtures)), None)


def taken_apart(
    mixtures: Tensor, known: Mixtures, steps: int, variation: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """Images (N, C, *spatial) in [0, 1], weights (N, N) and the mean squared error left, of mixtures (N, C, *spatial).

    Images start as the mixtures themselves, turned to the brighter side where signs are random; weights with a little
    more on a mixture's own image, as Mixup draws them.
    """
    count = len(mixtures)
    seen = mixtures.detach().double()
    if known.signs:
        seen = (2.0 * seen - 1.0).abs()
    start = (0.5 + 0.5 * seen if known.signs else seen).clamp(0.02, 0.98)
    images = torch.logit(start).requires_grad_()
    noise = 0.1 * torch.randn(count, count, dtype=torch.float64, generator=generator)
    logits = (noise + torch.eye(count, dtype=torch.float64)).requires_grad_()
    prior = smooth(variation)
    optimizer = torch.optim.Adam([images, logits], lr=RATE)
    error = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        pictures = images.sigmoid()
        made = torch.einsum("ij,j...->i...", logits.softmax(dim=1), pictures)
        made = (2.0 * made - 1.0).abs() if known.signs else made
        error = (made - seen).square().mean()
        (error + 0.1 * prior(pictures)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return images.sigmoid().detach().to(mixtures), logits.softmax(dim=1).detach().to(mixtures), float(error.detach())

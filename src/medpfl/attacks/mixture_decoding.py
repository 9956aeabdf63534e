"""Mixture decoding: mixtures are read out of the update, and then taken apart into images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.attacks.base import ATTACKS, Attack
from medpfl.attacks.matching.adam import Adam
from medpfl.attacks.matching.initialization import GREY, near
from medpfl.attacks.matching.inversion import invert
from medpfl.attacks.matching.priors import smooth
from medpfl.attacks.matching.settings import Inversion
from medpfl.attacks.mixtures import taken_apart
from medpfl.core.config import STRICT
from medpfl.core.domain import Failure, GlobalModel, Knowledge, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.mechanisms import Composed, Mechanism, Mixtures
from medpfl.core.session import NO_SESSION, Session

SPREAD = 0.02
"""Standard deviation of the noise around grey that images start with."""


@ATTACKS.register(
    "mixture_decoding",
    summary="mixtures with soft labels are found by gradient matching, and split into images and weights afterwards",
    paper="the two steps of Huang et al.: Evaluating Gradient Inversion Attacks and Defenses, NeurIPS 2021 "
    "(arXiv 2112.00059), with weights and partners searched too, as Carlini et al. (arXiv 2011.05315) do by other means",
    limits="of one round there are as many mixtures as images, which leaves much open (rounds: 2 or more in the recipe shows "
    "further ones of the same images); the published decodings are given weights and partners, or public images too",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixtureDecoding(Attack):
    """1. Mixtures E of each round and their soft labels: Adam on 1 - cosine + total variation. 2. Images P in [0, 1] and
    weights W, rows of a softmax, that minimize |E - W P|^2 + total variation over the mixtures of all rounds, of pixels
    with random signs ||2 E - 1| - |2 W P - 1||^2.

    Every round that is answered with the same images shows other mixtures of them (`Observation.earlier`). The search for
    images starts from the most extreme mixtures (`mixtures.extreme`): an image may be mixed with itself only. With random
    signs each pixel starts on the side of middle grey on which it is in the mean of auxiliary images, if there are some.

    Images are ranked by their summed weights. Without a known defense that mixes, the mixtures of the last round come
    back.
    """

    iterations: Annotated[int, Field(ge=1, description="Adam steps of the gradient matching, in each round")] = 1_000
    learning_rate: Annotated[float, Field(gt=0, description="step of the gradient matching")] = 0.05
    total_variation: Annotated[float, Field(ge=0, description="weight of total variation in both parts")] = 1e-2
    decoding_steps: Annotated[int, Field(ge=1, description="Adam steps of the decoding")] = 500

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {"iterations": 10_000, "decoding_steps": 1_000},
        "quick": {"iterations": 100, "decoding_steps": 100},
    }

    def uses(self) -> frozenset[str]:
        """The defense: how many images are in a mixture, and whether signs are random; and what images look like."""
        return frozenset({"defense", "auxiliary"})

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
        rounds = [_rounds(one) for one in observations]
        found = invert(
            [seen for several in rounds for seen in several],
            [one for stream, several in zip(generators, rounds, strict=True) for one in _streams(stream, len(several))],
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
        results, place = [], 0
        for several, stream in zip(rounds, generators, strict=True):
            own = found[place : place + len(several)]
            place += len(several)
            results.append(self._decoded(own, several[-1].knowledge, stream))
        return results

    def _decoded(
        self, found: Sequence[Reconstruction | Failure], knowledge: Knowledge, generator: torch.Generator
    ) -> Reconstruction | Failure:
        """Images of the mixtures of all rounds. found: what came of each round, the last one last."""
        known = mixing(knowledge.defense)
        last = found[-1]
        whole = [one for one in found if isinstance(one, Reconstruction) and len(one.images)]
        if isinstance(last, Failure) or known is None or len(last.images) < 2:
            return last
        mixtures = torch.cat([one.images for one in whole])
        typical = None if knowledge.auxiliary is None else knowledge.auxiliary.images.mean(dim=0)
        images, weights, error = taken_apart(
            mixtures, known, len(last.images), self.decoding_steps, self.total_variation, generator, typical
        )
        order = weights.sum(dim=0).argsort(descending=True)
        labels = None
        if all(one.labels is not None for one in whole):
            labels = torch.cat([one.labels for one in whole if one.labels is not None])
            several = labels.is_floating_point() and labels.ndim == 2
            shares = weights / weights.sum(dim=0)
            labels = (shares.T @ labels.to(weights))[order] if several else labels[weights.argmax(dim=0)][order]
        note = (
            f"{len(images)} images and their weights explain the {len(mixtures)} mixtures of {len(whole)} "
            f"{'round' if len(whole) == 1 else 'rounds'} to a mean squared error of {error:.2g}"
        )
        return replace(
            last,
            images=images[order],
            unclamped=None,
            labels=labels,
            gradient_evaluations=sum(one.gradient_evaluations for one in whole),
            notes=(*last.notes, note),
        )


def _rounds(observation: Observation) -> list[Observation]:
    """One observation for each round with the same model and images, the last one last."""
    return [replace(observation, update=one, earlier=()) for one in (*observation.earlier, observation.update)]


def _streams(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """The generator itself for the last round, others drawn from it for those before."""
    seeds = torch.randint(2**62, (count - 1,), generator=generator).tolist() if count > 1 else []
    return [*(torch.Generator().manual_seed(seed) for seed in seeds), generator]


def mixing(mechanism: Mechanism | None) -> Mixtures | None:
    """What is known of the mixtures, also as a part of a composition."""
    parts = mechanism.parts if isinstance(mechanism, Composed) else (mechanism,)
    return next((part for part in parts if isinstance(part, Mixtures)), None)

"""Which attacks still work behind a filter: a small audit on drawn images, beside the same attacks without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from medpfl.attacks import ATTACKS
from medpfl.attacks.base import Attack
from medpfl.audit.filters.samples import drawn_images
from medpfl.audit.filters.subject import Subject, call
from medpfl.core.domain import Batch, GlobalModel, Observation, Reconstruction, Update
from medpfl.core.knowledge import Knowledge
from medpfl.core.mechanisms import Mechanism
from medpfl.core.recipes import Recipe
from medpfl.core.seeding import generator
from medpfl.data import Dataset
from medpfl.federation.client import client_step
from medpfl.metrics.nulls import null_baselines
from medpfl.metrics.scoring import score
from medpfl.metrics.truth import GroundTruth
from medpfl.models import build_model

THRESHOLD = 0.9
"""SSIM of a success, as in audits."""

POOL = 64
"""Drawn images of others, for the null baseline."""

MODEL = "lenet_dlg"
"""What is trained: a small network in which images are easily reconstructed without a filter."""

NAIVE: Mapping[str, Mapping[str, Any]] = {
    "cpl": {"iterations": 40},
    "gradinv": {"iterations": 400, "total_variation": 1e-4},
}
"""Attacks that know nothing of the filter: least squares, and directions only, which no rescaling disturbs."""

ADAPTIVE: Mapping[str, Any] = {"name": "gradinv", "iterations": 400, "distance": "likelihood", "total_variation": 1e-2}
"""The attack that knows the recognized mechanism."""


@dataclass(frozen=True)
class Leakage:
    """One attack behind the filter, or without it: mean SSIM and PSNR (dB) over the victims, and how many succeeded.

    null_ssim, null_psnr: of the most similar drawn image of somebody else, which uses no update. reason: why nothing was
    attacked, else empty.
    """

    attack: str
    filtered: bool
    adaptive: bool
    victims: int
    successes: int = 0
    ssim: float | None = None
    psnr: float | None = None
    null_ssim: float | None = None
    null_psnr: float | None = None
    reason: str = ""

    @property
    def works(self) -> bool:
        """Whether more came back than somebody else's image shows."""
        return self.ssim is not None and self.null_ssim is not None and self.ssim > self.null_ssim + 0.05


def leakage(subject: Subject, mechanism: Mechanism | None, victims: int) -> tuple[Leakage, ...]:
    """Single gradients of an untrained network: the easiest case for attackers, hence the hardest for the filter."""
    data = drawn_images(victims + POOL, seed=1)
    model = build_model(
        MODEL, image_shape=tuple(data.images.shape[1:]), task=data.task, generator=generator("filter model")
    )
    clean = [_update(model, data, number) for number in range(victims)]
    made, filtered = subject.made(), []
    for number, update in enumerate(clean):
        found = call(made, update.trainable, arrays=subject.arrays, seed=number)
        problem = found.error or _unlike(update, found.sent)
        if problem:
            reason = f"behind the filter there is no update to attack: {problem}"
            return (Leakage("all", True, False, victims, reason=reason),)
        same = {name: found.sent[name].to(tensor.dtype) for name, tensor in update.trainable.items()}
        filtered.append(replace(update, trainable=same))
    rows = []
    for name, settings in NAIVE.items():
        attack = ATTACKS[name].item(**settings)
        rows.append(_row(name, attack, model, clean, data, filtered=False))
        rows.append(_row(name, attack, model, filtered, data, filtered=True))
    if mechanism is not None:
        settings = dict(ADAPTIVE)
        name = settings.pop("name")
        attack = ATTACKS[name].item(**settings)
        rows.append(_row(f"{name} that knows the filter", attack, model, filtered, data, True, mechanism))
    return tuple(rows)


def _update(model: GlobalModel, data: Dataset, number: int) -> Update:
    batch = Batch(data.images[number : number + 1], data.targets[number : number + 1])
    return client_step(model, batch, Recipe(), generator=generator("filter client", number))[0]


def _unlike(update: Update, sent: Mapping[str, torch.Tensor]) -> str:
    for name, tensor in update.trainable.items():
        if name not in sent:
            return f"'{name}' is missing"
        if sent[name].shape != tensor.shape:
            return f"'{name}' has another shape"
        if not bool(torch.isfinite(sent[name].double()).all()):
            return f"'{name}' is not finite"
    return ""


def _row(
    name: str,
    attack: Attack,
    model: GlobalModel,
    updates: Sequence[Update],
    data: Dataset,
    filtered: bool,
    mechanism: Mechanism | None = None,
) -> Leakage:
    observations = [
        Observation(
            model=model,
            update=update,
            recipe=Recipe(),
            threat_model="honest_server",
            knowledge=Knowledge(defense=mechanism),
        )
        for update in updates
    ]
    against = None if mechanism is None else attack.why_not_against(mechanism, model, Recipe(), 1)
    if reason := attack.why_not(model, Recipe(), "gradient", 1) or against:
        return Leakage(name, filtered, mechanism is not None, len(updates), reason=reason)
    results = attack.reconstruct(observations, [generator("filter attack", number) for number in range(len(updates))])
    truths = [
        GroundTruth(data.images[number : number + 1], data.targets[number : number + 1], (data.items[number],))
        for number in range(len(updates))
    ]
    others, targets = data.images[len(updates) :], data.targets[len(updates) :]
    scores = [
        score(
            found if isinstance(found, Reconstruction) else None,
            truth,
            fallback=others.mean(dim=0),
            threshold=THRESHOLD,
        )[0]
        for found, truth in zip(results, truths, strict=True)
    ]
    nulls = [null_baselines(truth, others, targets, generator("filter nulls"))["nearest"] for truth in truths]
    return Leakage(
        attack=name,
        filtered=filtered,
        adaptive=mechanism is not None,
        victims=len(updates),
        successes=sum(one.success for one in scores),
        ssim=sum(one.ssim for one in scores) / len(scores),
        psnr=sum(one.psnr for one in scores) / len(scores),
        null_ssim=sum(float(one.ssim[0]) for one in nulls) / len(nulls),
        null_psnr=sum(float(one.psnr[0]) for one in nulls) / len(nulls),
    )

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
from medpfl.core.domain import Auxiliary, Batch, GlobalModel, Observation, Reconstruction, Update
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

OWNED = 160
"""Drawn images that an adaptive attacker owns."""

MODEL = "lenet_dlg"
"""What is trained: a small network in which images are easily reconstructed without a filter."""

NAIVE: Mapping[str, Mapping[str, Any]] = {
    "cpl": {"iterations": 40},
    "gradinv": {"iterations": 400, "total_variation": 1e-4},
}
"""Attacks that know nothing of the filter: least squares, and directions only, which no rescaling disturbs."""

ADAPTIVE: Mapping[str, Any] = {"name": "maximum_a_posteriori", "prior": "covariance", "iterations": 150}
"""The attack that knows the recognized mechanism and owns images like the victims'."""


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


@dataclass(frozen=True)
class _Setting:
    """What is attacked: the model, so many victims at the head of the images, null baselines and the attacker's own behind."""

    model: GlobalModel
    data: Dataset
    victims: int

    def truth(self, number: int) -> GroundTruth:
        """One victim's image."""
        one = slice(number, number + 1)
        return GroundTruth(self.data.images[one], self.data.targets[one], (self.data.items[number],))

    @property
    def nulls(self) -> Batch:
        """Images of others."""
        part = slice(self.victims, self.victims + POOL)
        return Batch(self.data.images[part], self.data.targets[part])

    @property
    def auxiliary(self) -> Auxiliary:
        """Images that the attacker owns."""
        return Auxiliary(self.data.images[self.victims + POOL :], self.data.targets[self.victims + POOL :])


def leakage(subject: Subject, mechanism: Mechanism | None, victims: int) -> tuple[Leakage, ...]:
    """Single gradients of an untrained network: the easiest case for attackers, hence the hardest for the filter."""
    data = drawn_images(victims + POOL + OWNED, seed=1)
    shape = tuple(data.images.shape[1:])
    model = build_model(MODEL, image_shape=shape, task=data.task, generator=generator("filter model"))
    setting = _Setting(model, data, victims)
    clean = [_update(setting, number) for number in range(victims)]
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
        rows.append(_row(name, attack, setting, clean, filtered=False))
        rows.append(_row(name, attack, setting, filtered, filtered=True))
    if mechanism is not None:
        settings = dict(ADAPTIVE)
        name = settings.pop("name")
        attack = ATTACKS[name].item(**settings)
        rows.append(_row(f"{name} that knows the filter", attack, setting, filtered, True, mechanism))
    return tuple(rows)


def _update(setting: _Setting, number: int) -> Update:
    truth = setting.truth(number)
    batch = Batch(truth.images, truth.labels)
    return client_step(setting.model, batch, Recipe(), generator=generator("filter client", number))[0]


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
    setting: _Setting,
    updates: Sequence[Update],
    filtered: bool,
    mechanism: Mechanism | None = None,
) -> Leakage:
    adaptive = mechanism is not None
    owned = setting.auxiliary if adaptive and "auxiliary" in attack.uses() | attack.requires() else None
    observations = [
        Observation(
            model=setting.model,
            update=update,
            recipe=Recipe(),
            threat_model="honest_server",
            knowledge=Knowledge(defense=mechanism, auxiliary=owned),
        )
        for update in updates
    ]
    against = None if mechanism is None else attack.why_not_against(mechanism, setting.model, Recipe(), 1)
    if reason := attack.why_not(setting.model, Recipe(), "gradient", 1) or against:
        return Leakage(name, filtered, adaptive, len(updates), reason=reason)
    streams = [generator("filter attack", number) for number in range(len(updates))]
    results = attack.reconstruct(observations, streams)
    others = setting.nulls
    scores = [
        score(
            found if isinstance(found, Reconstruction) else None,
            setting.truth(number),
            fallback=others.images.mean(dim=0),
            threshold=THRESHOLD,
        )[0]
        for number, found in enumerate(results)
    ]
    nulls = [
        null_baselines(setting.truth(number), others.images, others.targets, generator("filter nulls"))["nearest"]
        for number in range(len(updates))
    ]
    return Leakage(
        attack=name,
        filtered=filtered,
        adaptive=adaptive,
        victims=len(updates),
        successes=sum(one.success for one in scores),
        ssim=sum(one.ssim for one in scores) / len(scores),
        psnr=sum(one.psnr for one in scores) / len(scores),
        null_ssim=sum(float(one.ssim[0]) for one in nulls) / len(nulls),
        null_psnr=sum(float(one.psnr[0]) for one in nulls) / len(nulls),
    )

"""How far an attack got by what the server itself can check: would its pictures have sent this update?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medpfl.attacks.updates import one_gradient
from medpfl.audit.replay.diagnosis.changes import Owned
from medpfl.audit.replay.diagnosis.noise import class_sums
from medpfl.audit.replay.diagnosis.subject import Fact, Subject, plural
from medpfl.audit.replay.diagnosis.training import DRAWN, random_batch
from medpfl.core.domain import Batch, Recipe, Tensors
from medpfl.core.errors import InputError
from medpfl.core.seeding import generator
from medpfl.federation.changes import sent_change
from medpfl.federation.client import client_step

MATCHED = 0.99
"""Cosine, over the largest that noise allows, from which pictures explain an update."""


@dataclass(frozen=True)
class Match:
    """Cosines with the recorded change: of what the pictures would have sent, of the best of random images, and the
    largest that the noise in the update allows (1 without)."""

    pictures: float
    random: float
    allowed: float

    @property
    def matched(self) -> bool:
        """Whether the pictures explain the update as far as noise allows."""
        return self.pictures >= MATCHED * self.allowed


def case_facts(subject: Subject, rows: Sequence[Mapping[str, Any]], folder: Path, owned: Owned | None) -> list[Fact]:
    """How far one attack got on one update. rows: its rows of `results.csv`. owned: the truth, where it is known."""
    first = rows[0]
    attack = str(first["attack"])
    if first["status"] == "failed":
        return [Fact("search", f"The attack broke down: {first['reason']}.", None, "hinders", attack)]
    stop = str(first.get("stop_reason") or "")
    if stop.startswith("nothing came back"):
        return [Fact("search", f"{stop[:1].upper()}{stop[1:]}.", None, "hinders", attack)]
    found = match(subject, rows, folder)
    if isinstance(found, str):
        return [
            Fact(
                "search", f"How well its pictures explain the update was not checked: {found}.", None, "neutral", attack
            )
        ]
    against = (
        f"cosine {found.pictures:.4f} between what its pictures would have sent and what was recorded; of {DRAWN} draws of "
        f"random images at most {found.random:.4f}"
    )
    limit = f", and noise lets even the true images reach about {found.allowed:.2f} only" if found.allowed < 1 else ""
    if owned is not None and not isinstance(owned.agreement, str) and not owned.agreement.found:
        limit = f", the true images reach {owned.agreement.cosine:.4f}"
        found = replace(found, allowed=1.0 if owned.agreement.agrees else max(0.0, owned.agreement.cosine))
    if found.matched and found.allowed < MATCHED:
        text = f"The search went as far as the true images would, or further: {against}{limit}. What fits better fits noise, or "
        text += "what else was done to the update."
        return [Fact("search", text, found.pictures, "hinders", attack)]
    if found.matched:
        claim = (
            "" if owned is not None else " Whether they show the patient's images cannot be told without ground truth."
        )
        return [Fact("search", f"Its pictures explain the update: {against}.{claim}", found.pictures, "helps", attack)]
    if found.pictures <= found.random:
        text = f"The search found nothing: {against}{limit}."
    else:
        text = f"The search stopped short: {against}{limit}. {_budget(first, stop)}"
    return [Fact("search", text.strip(), found.pictures, "hinders", attack)]


def _budget(row: Mapping[str, Any], stop: str) -> str:
    spent = row.get("gradient_evaluations")
    told = f"It spent {plural(int(spent), 'gradient evaluation')}" if spent else "It searched"
    return f"{told}{f' and ended because: {stop}' if stop else ''}."


def match(subject: Subject, rows: Sequence[Mapping[str, Any]], folder: Path) -> Match | str:
    """Compares what the pictures and random images would have sent with the recorded change, or says why it cannot."""
    observation, model = subject.observation, subject.model
    if observation.clients > 1 and not one_gradient(subject.recipe):
        return "the update mixes several clients that took several steps each"
    if model.task.name != "single_label":
        return f"a picture has no labels to train with ({model.task.name})"
    kept = [row for row in rows if row.get("candidate") is not None and row.get("reconstruction_image")]
    if len(kept) != observation.examples:
        return f"{plural(len(kept), 'picture')} came back for {plural(observation.examples, 'image')}"
    labels = [row.get("label_inferred") for row in kept]
    if not all(isinstance(one, int) for one in labels):
        return "the attack names no labels"
    images = torch.stack([_image(folder / str(row["reconstruction_image"])) for row in kept])
    batch = Batch(images, torch.tensor(labels))
    recipe = _simulated(subject)
    stream = generator("random images", model.name)
    try:
        pictures = _cosine(subject, batch, recipe)
        drawn = [
            _cosine(subject, Batch(random_batch(model, len(images), stream).images, batch.targets), recipe)
            for _ in range(DRAWN)
        ]
    except InputError as error:
        return str(error)
    sums = class_sums(subject)
    noise = 0.0 if isinstance(sums, str) else sums.part(subject)
    return Match(pictures, max(drawn), max(0.0, 1.0 - noise) ** 0.5)


def _image(path: Path) -> Tensor:
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as archive:
        return torch.from_numpy(np.asarray(archive["image"], dtype=np.float32))


def _simulated(subject: Subject) -> Recipe:
    """How the attacker takes the client to train: as told, else by one gradient."""
    recipe = subject.recipe
    if recipe is None:
        return Recipe(update="gradient")
    if subject.observation.clients > 1:  # the mean of their first steps is the step of their mean gradient
        return Recipe(update="gradient", batch_norm=recipe.batch_norm)
    return recipe


def _cosine(subject: Subject, batch: Batch, recipe: Recipe) -> float:
    own = Recipe(update="gradient", batch_norm=recipe.batch_norm) if recipe.update == "gradient" else recipe
    update, _ = client_step(subject.model, batch, own, generator=generator("replayed client", 0))
    change = sent_change(update, subject.model.parameters)
    downhill = own.update == "gradient" and subject.observation.update.kind != "gradient"
    found = _angle(change, subject.change)
    return -found if downhill else found


def _angle(one: Tensors, other: Tensors) -> float:
    names = [name for name in one if name in other]
    inner = sum(float((one[name] * other[name]).sum()) for name in names)
    squares = [sum(float(part[name].square().sum()) for name in names) for part in (one, other)]
    return inner / (squares[0] * squares[1]) ** 0.5 if min(squares) > 0 else 0.0

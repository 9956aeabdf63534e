"""Noise that an update carries, read off what must be zero without it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from medpfl.attacks.layers import DenseLayer, last_dense
from medpfl.audit.replay.diagnosis.subject import Fact, Subject, plural, share

ROUNDING_MARGIN = 10.0
"""Times the rounding error from which a sum that must be zero is not."""

RELATIVE_MARGIN = 1e-4
"""Share of the layer's own change from which it is not."""

DECAYED = 0.1
"""Weight decay explains the sums if no more than this share of their size is left."""

FEWEST_SUMS = 64
"""Of fewer sums the kind of noise is not named."""


@dataclass(frozen=True)
class ClassSums:
    """What the rows of the last layer's change add up to.

    sums: (inputs,), zero for softmax cross entropy trained with SGD without weight decay. deviation: standard deviation
    per entry of the layer that would leave such sums. floor: what rounding leaves. decay: sums over the sums of the
    weights themselves, where these explain them. classes: rows.
    """

    layer: str
    sums: Tensor
    deviation: float
    floor: float
    decay: float | None
    classes: int

    @property
    def noised(self) -> bool:
        """Whether there is something that must not be there."""
        return self.decay is None and self.deviation > self.floor

    @property
    def kurtosis(self) -> float:
        """Excess kurtosis of the sums; noise of single entries has `classes` times as much."""
        square = self.sums.square().mean()
        return float(self.sums.pow(4).mean() / square**2 - 3) if float(square) > 0 else 0.0

    def part(self, subject: Subject) -> float:
        """Share of the update's squared norm that the noise makes up if it is alike on all entries."""
        return min(1.0, self.deviation**2 * subject.entries / max(subject.size**2, 1e-300)) if self.noised else 0.0


def class_sums(subject: Subject) -> ClassSums | str:
    """The sums over classes of the last layer's change, or why they tell nothing.

    Softmax outputs and targets both add up to one, so the gradient's rows of the last layer add up to zero, for any
    images, labels, batch size and number of local steps.
    """
    model, recipe = subject.model, subject.recipe
    if model.task.name != "single_label":
        return f"a model for the task {model.task.name} has no sums that must be zero"
    layer = last_dense(model)
    if not isinstance(layer, DenseLayer):
        return layer
    if layer.weight not in subject.change:
        return f"'{layer.weight}' was not sent"
    if recipe is not None and recipe.optimizer != "sgd" and model.task.classes > 2:
        return f"{recipe.optimizer} scales every entry on its own, so that no sum must be zero"
    changed = subject.change[layer.weight]
    classes = len(changed)
    sums = changed.sum(dim=0)
    deviation = float(sums.square().mean().sqrt()) / math.sqrt(classes)
    steps = 1 if recipe is None else recipe.local_steps * recipe.epochs
    floor = ROUNDING_MARGIN * subject.rounding(layer.weight) * math.sqrt(max(1, steps))
    floor = max(floor, RELATIVE_MARGIN * float(changed.square().mean().sqrt()))
    return ClassSums(layer.module, sums, deviation, floor, _decay(subject, layer, sums, deviation, floor), classes)


def _decay(subject: Subject, layer: DenseLayer, sums: Tensor, deviation: float, floor: float) -> float | None:
    """The factor by which the sums of the weights explain those of their change; None if they do not."""
    if deviation <= floor or subject.observation.update.kind == "gradient":
        return None
    weights = subject.model.parameters[layer.weight].double().sum(dim=0)
    square = float(weights.square().sum())
    if square == 0:
        return None
    factor = float((sums * weights).sum()) / square
    left = float((sums - factor * weights).norm() / sums.norm())
    return -factor if left <= DECAYED and factor < 0 else None


def noise(subject: Subject) -> Iterator[Fact]:
    """Whether noise (or another error) was added, how much, and what it looks like."""
    found = class_sums(subject)
    if isinstance(found, str):
        yield Fact("noise", f"Whether noise was added cannot be told: {found}.")
        return
    proviso = "" if subject.recipe is not None else ", if the client trained with SGD"
    relation = f"The {found.classes} rows of the change of '{found.layer}' must add up to zero{proviso}"
    if found.decay is not None:
        yield Fact(
            "noise",
            f"{relation}; what they add up to is {share(found.decay)} of the weights themselves with the opposite sign: "
            "weight decay, no noise.",
            0.0,
        )
        return
    if not found.noised:
        yield Fact(
            "noise",
            f"No noise was found: {_lowered(relation)}, and do so up to a deviation of {found.deviation:.2g} an entry, which "
            "rounding explains.",
            found.deviation,
            "helps",
        )
        return
    added = "noise, or the error of a compression or of 16-bit training"
    if subject.recipe is None:
        added += ", or another optimizer trained"
    part, error = found.part(subject), 2 * math.sqrt(2 / len(found.sums))  # twice the standard error of a variance
    yield Fact(
        "noise",
        f"{relation}; they miss it by a standard deviation of {found.deviation:.3g} an entry over "
        f"{plural(len(found.sums), 'column')}{_kind(found)}: something was added ({added}). "
        f"On all {plural(subject.entries, 'entry')} alike it would be {share(part)} (± {share(part * error)}) of the update's "
        "squared norm.",
        found.deviation,
        "hinders" if part >= RELATIVE_MARGIN else "neutral",
    )


def _kind(found: ClassSums) -> str:
    if len(found.sums) < FEWEST_SUMS:
        return ""
    single = found.classes * found.kurtosis
    error = found.classes * math.sqrt(24 / len(found.sums))
    return (
        f", with an excess kurtosis of {single:.1f} ± {2 * error:.1f} (normal noise has 0, Laplace noise 3)"
        if 2 * error < 3
        else ""
    )


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]

"""Facts for those who own the truth: whether the client's step gives what was recorded, and what it looks like if not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from medpfl.attacks.labels import infer_labels
from medpfl.attacks.updates import one_gradient
from medpfl.audit.replay.diagnosis.agreement import AGREES, Agreement, differences
from medpfl.audit.replay.diagnosis.subject import Fact, Subject, plural, share
from medpfl.core.domain import GlobalModel
from medpfl.metrics.truth import GroundTruth

EVEN = 1.3
"""Deviations of the tensors' residuals count as equal up to this ratio."""

ENOUGH = 64
"""Tensors of fewer entries say little about a deviation."""


def owned(subject: Subject, groups: Sequence[GroundTruth], found: Agreement | str) -> list[Fact]:
    """All facts that need the true images."""
    return [
        *_counted(subject, groups),
        *_agreed(subject, found),
        *_true_labels(subject, groups),
        *_loss(subject, groups),
    ]


def _counted(subject: Subject, groups: Sequence[GroundTruth]) -> Iterator[Fact]:
    held, said = sum(len(group.images) for group in groups), subject.observation.examples
    if held != said:
        yield Fact(
            "true_images",
            f"The truth holds {plural(held, 'image')} of this client, the update says {said}: one of them is of another round "
            "or client.",
            held,
            "hinders",
        )


def _agreed(subject: Subject, found: Agreement | str) -> Iterator[Fact]:
    if isinstance(found, str):
        yield Fact("agreement", f"The client's step could not be replayed: {found}.")
        return
    how = "the client's step on the true images"
    if found.found:
        other = differences(found.recipe, subject.recipe)
        told = (
            "No recipe was given" if subject.recipe is None else "The recipe that was given does not explain the update"
        )
        yield Fact(
            "recipe_found",
            f"{told}; with {{{other}}} {how} gives it (cosine {_cosine(found.cosine)}, {share(found.left)} of its squared norm "
            "left).",
            found.left,
            "hinders",
        )
    if found.agrees:
        if not found.found:
            yield Fact(
                "agreement",
                f"Replayed as the recipe says, {how} gives the recorded update: cosine {_cosine(found.cosine)}, "
                f"{share(found.left)} of its squared norm left. No defense acted on it.",
                found.cosine,
                "helps",
            )
        return
    if not found.found or found.left > AGREES:
        yield Fact(
            "agreement",
            f"Replayed as {'that' if found.found else 'the'} recipe says, {how} does not {'quite ' if found.left < 0.5 else ''}give the "
            "recorded update: "
            f"cosine {_cosine(found.cosine)}, {share(min(1.0, found.left))} of its squared norm left: a defense or a "
            "compression acted, or the recipe is not this client's.",
            found.cosine,
            "hinders",
        )
    yield from _residual(found)


def _cosine(value: float) -> str:
    return f"{value:.3f}" if value < 0.9995 else f"{value:.7f}".rstrip("0").ljust(5, "0")


def _residual(found: Agreement) -> Iterator[Fact]:
    """What the part that the replay does not explain looks like."""
    if found.left_scaled <= AGREES:
        one = one_gradient(found.recipe) and found.recipe.update != "gradient" and found.recipe.optimizer == "sgd"
        rate = f" ({found.recipe.learning_rate * found.factor:.4g})" if one and found.factor > 0 else ""
        yield Fact(
            "residual",
            f"The recorded update is {found.factor:.4g} times the replayed one and nothing else ({share(found.left_scaled)} "
            f"left): clipping, a weight, or another learning rate{rate}.",
            found.factor,
            "neutral",
        )
        return
    scaled = "" if abs(found.factor - 1) < 0.02 else f" after scaling the replayed one by {found.factor:.3g}"
    dropped = _dropped(found)
    if dropped >= 0.05:
        yield Fact(
            "dropped",
            f"{share(dropped)} of the entries that the client's step changes came back unchanged: sparsification, pruning, or "
            "a grid that is too coarse for them.",
            dropped,
            "hinders",
        )
    residual = found.residual()
    spreads = {name: float(one.square().mean().sqrt()) for name, one in residual.items() if one.numel() >= ENOUGH}
    whole = torch.cat([one.flatten() for one in residual.values()])
    deviation, kurtosis = float(whole.square().mean().sqrt()), _kurtosis(whole)
    even = len(spreads) > 0 and max(spreads.values()) <= EVEN * min(spreads.values())
    look = (
        f"alike in all large tensors ({min(spreads.values()):.3g} to {max(spreads.values()):.3g}), with an excess kurtosis of "
        f"{kurtosis:.1f} (normal noise has 0, Laplace noise 3, rounding to a grid -1.2)"
        if even
        else f"from {min(spreads.values()):.3g} to {max(spreads.values()):.3g} by tensor, unlike noise that is alike everywhere"
        if spreads
        else "over few entries"
    )
    yield Fact(
        "residual",
        f"What is left{scaled} has a standard deviation of {deviation:.3g} an entry, {look}.",
        deviation,
        "hinders",
    )


def _dropped(found: Agreement) -> float:
    """Share of the entries that the step changes and the recorded update does not."""
    changed = gone = 0
    for name, tensor in found.replayed.items():
        floor = 1e-4 * float(tensor.square().mean().sqrt())
        moved = tensor.abs() > floor
        changed += int(moved.sum())
        gone += int((moved & (found.recorded[name] == 0)).sum())
    return gone / changed if changed else 0.0


def _kurtosis(values: Tensor) -> float:
    square = values.square().mean()
    return float(values.pow(4).mean() / square**2 - 3) if float(square) > 0 else 0.0


def _true_labels(subject: Subject, groups: Sequence[GroundTruth]) -> Iterator[Fact]:
    inferred = infer_labels(subject.observation).labels
    labels = torch.cat([group.labels for group in groups])
    if inferred is None or inferred.shape != labels.shape or labels.is_floating_point():
        return
    classes = subject.model.task.classes
    both = torch.minimum(*(torch.bincount(one, minlength=classes) for one in (inferred, labels)))
    right = int(both.sum())
    yield Fact(
        "true_labels",
        f"{right} of the {plural(len(labels), 'inferred label')} are right.",
        right / len(labels),
        "helps" if right == len(labels) else "hinders",
    )


def _loss(subject: Subject, groups: Sequence[GroundTruth]) -> Iterator[Fact]:
    images, targets = (torch.cat([getattr(group, name) for group in groups]) for name in ("images", "targets"))
    received, fresh = (_mean_loss(model, images, targets) for model in (subject.model, subject.fresh))
    if math.isfinite(received):
        yield Fact(
            "true_loss",
            f"On the true images the received model has a loss of {received:.3g}, a freshly drawn one {fresh:.3g}.",
            received,
        )


def _mean_loss(model: GlobalModel, images: Tensor, targets: Tensor) -> float:
    with torch.no_grad():
        output, _ = model.forward(images.to(next(iter(model.parameters.values()))))
        return float(model.task.loss(output, targets))

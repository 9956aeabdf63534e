"""The client's own step replayed on the true images: does it give what was recorded, and what is left if not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from medpfl.core.domain import Batch, GlobalModel, Recipe, Tensors, Update, UpdateKind
from medpfl.core.errors import InputError
from medpfl.core.seeding import generator
from medpfl.federation.changes import norm, sent_change
from medpfl.federation.client import client_step
from medpfl.federation.recipes import has_batch_norm
from medpfl.metrics.truth import GroundTruth

AGREES = 1e-4
"""Share of the recorded update's squared norm up to which what is left is rounding of another machine."""

EXPLAINED = 1e-2
"""Share up to which another recipe counts as the client's own."""

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
EPOCHS = (1, 2, 3, 5)
OPTIMIZERS: tuple[Literal["sgd", "adam", "adamw"], ...] = ("sgd", "adam", "adamw")
"""What is tried in place of a recipe that does not explain an update."""

ROUGH, FINE, POLISHED = 2, 8, 2
"""Learning rates that are tried for each of them, then for the closest ones, and how many these are."""


@dataclass(frozen=True)
class Agreement:
    """A recorded change beside that of the client's step on the true images.

    recipe: with which the step was replayed. expected: what it sends. recorded, replayed: the changes, float64. found:
    whether the recipe is another than the stated one, which explains the update.
    """

    recipe: Recipe
    expected: Update
    recorded: Tensors
    replayed: Tensors
    found: bool = False

    @cached_property
    def factor(self) -> float:
        """By what the replayed change is scaled to come closest to the recorded one."""
        square = sum(float(tensor.square().sum()) for tensor in self.replayed.values())
        return self._inner / square if square > 0 else 0.0

    @cached_property
    def cosine(self) -> float:
        """Cosine between both."""
        lengths = norm(self.recorded) * norm(self.replayed)
        return self._inner / lengths if lengths > 0 else 0.0

    @cached_property
    def _inner(self) -> float:
        return sum(float((self.recorded[name] * self.replayed[name]).sum()) for name in self.replayed)

    @cached_property
    def left(self) -> float:
        """Share of the recorded change's squared norm that the replayed one leaves."""
        return self._left(1.0)

    @cached_property
    def left_scaled(self) -> float:
        """The same after scaling by `factor`."""
        return self._left(self.factor)

    def _left(self, factor: float) -> float:
        square = norm(self.recorded) ** 2
        return norm(self.residual(factor)) ** 2 / square if square > 0 else 0.0

    def residual(self, factor: float | None = None) -> dict[str, Tensor]:
        """Recorded less scaled replayed change (scaled to come closest, if no factor is given)."""
        by = self.factor if factor is None else factor
        return {name: self.recorded[name] - by * tensor for name, tensor in self.replayed.items()}

    @property
    def agrees(self) -> bool:
        """Whether nothing but rounding is left."""
        return self.left <= AGREES


def step_of(model: GlobalModel, groups: Sequence[GroundTruth], recipe: Recipe) -> Update:
    """What clients with these images send together: their mean, weighted by images. Raises InputError if they cannot."""
    updates = []
    for group in groups:
        own = replace(recipe, images=len(group.images))
        batch = Batch(group.images, group.targets)
        updates.append(client_step(model, batch, own, generator=generator("replayed client", 0))[0])
    counts = [len(group.images) for group in groups]
    first = updates[0]
    if len(updates) == 1:
        return first
    mean = {name: _mean([one.trainable[name] for one in updates], counts) for name in first.trainable}
    buffers = {name: _mean([one.buffers[name] for one in updates], counts) for name in first.buffers}
    return replace(first, trainable=mean, buffers=buffers, examples=sum(counts))


def _mean(tensors: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    weighted = [count * tensor.double() for count, tensor in zip(counts, tensors, strict=True)]
    return (torch.stack(weighted).sum(dim=0) / sum(counts)).to(tensors[0])


def agreement(
    model: GlobalModel, recorded: Tensors, groups: Sequence[GroundTruth], recipe: Recipe, *, found: bool = False
) -> Agreement | str:
    """The recorded change beside that of `recipe`, or why the recipe cannot be carried out on these images."""
    try:
        expected = step_of(model, groups, recipe)
    except InputError as error:
        return str(error)
    replayed = sent_change(expected, model.parameters)
    kept = {name: tensor for name, tensor in replayed.items() if name in recorded}
    return Agreement(recipe, expected, recorded, kept, found)


def best_agreement(
    model: GlobalModel,
    recorded: Tensors,
    groups: Sequence[GroundTruth],
    recipe: Recipe | None,
    kind: UpdateKind,
    *,
    noisy: bool = False,
) -> Agreement | str:
    """With the stated recipe, or with another one that explains the update where that one does not.

    Where none explains it, the stated recipe's; a reason where nothing was stated either, or it cannot be carried out.
    noisy: the update misses what any training with SGD leaves, by more than `EXPLAINED`, so that only other optimizers
    are tried.
    """
    largest = max(len(group.images) for group in groups)
    stated: Agreement | str = "how the client trains was not given, and no recipe that was tried explains the update"
    if recipe is not None:
        stated = agreement(model, recorded, groups, recipe)
        if isinstance(stated, Agreement) and (stated.left <= EXPLAINED or stated.left_scaled <= AGREES):
            return stated
    base = recipe or Recipe(update=kind, batch_size=largest)
    tried: list[tuple[float, Recipe]] = []
    for other in _others(base, largest, has_batch_norm(model)):
        if noisy and other.optimizer == "sgd":
            continue
        fitted = _fitted(model, recorded, groups, other, ROUGH)
        if isinstance(fitted, Agreement):
            tried.append((fitted.left, fitted.recipe))
            if fitted.agrees:
                return fitted
    for one in _closest(tried) if base.update != "gradient" and not noisy else ():
        for epochs in EPOCHS:
            if epochs != one.epochs:
                fitted = _fitted(model, recorded, groups, replace(one, epochs=epochs), ROUGH)
                tried += [(fitted.left, fitted.recipe)] if isinstance(fitted, Agreement) else []
    for one in _closest(tried):
        fitted = _fitted(model, recorded, groups, one, FINE)
        if isinstance(fitted, Agreement) and fitted.left <= EXPLAINED:
            return fitted
    return stated


def _closest(tried: Sequence[tuple[float, Recipe]]) -> list[Recipe]:
    """The ones that leave least, each once whatever its learning rate."""
    by_recipe: dict[str, Recipe] = {}
    for _, recipe in sorted(tried, key=lambda one: one[0]):
        by_recipe.setdefault(str(replace(recipe, learning_rate=1.0)), recipe)
    return list(by_recipe.values())[:POLISHED]


def _others(base: Recipe, images: int, normalized: bool) -> Iterator[Recipe]:
    """Recipes that differ in one respect, each with batch norm in both modes where there is any."""
    both: tuple[Literal["train", "eval"], ...] = ("eval", "train")
    modes = both if normalized else (base.batch_norm,)
    yield from (replace(base, batch_norm=mode, images=None) for mode in modes)
    if base.update == "gradient":
        return
    for mode in modes:
        moded = replace(base, batch_norm=mode, images=None)
        for epochs in EPOCHS:
            if epochs != base.epochs:
                yield replace(moded, epochs=epochs)
        for optimizer in OPTIMIZERS:
            if optimizer != base.optimizer:
                yield replace(moded, optimizer=optimizer, momentum=0.0)
        if base.optimizer == "sgd" and base.momentum == 0 and base.local_steps * base.epochs > 1:
            yield replace(moded, momentum=0.9)
        for size in sorted({*BATCH_SIZES, base.batch_size, images}, reverse=True):
            if size <= images:
                yield replace(moded, batch_size=size, local_steps=math.ceil(images / size), accumulation=1)


def _fitted(
    model: GlobalModel, recorded: Tensors, groups: Sequence[GroundTruth], recipe: Recipe, trials: int
) -> Agreement | str:
    """With the learning rate at which both changes are equally long: secant steps in its logarithm, the closest is kept."""
    best = found = agreement(model, recorded, groups, recipe, found=True)
    points: list[tuple[float, float]] = []
    for _ in range(trials):
        if isinstance(found, str) or isinstance(best, str) or recipe.update == "gradient":
            break
        lengths = norm(found.recorded), norm(found.replayed)
        if not min(lengths) > 0 or not math.isfinite(lengths[1]) or best.agrees:
            break
        points.append((math.log(recipe.learning_rate), math.log(lengths[0] / lengths[1])))
        recipe = replace(recipe, learning_rate=math.exp(_next(points)))
        found = agreement(model, recorded, groups, recipe, found=True)
        if isinstance(found, Agreement) and found.left < best.left:
            best = found
    return best


def _next(points: Sequence[tuple[float, float]]) -> float:
    """Where the second coordinate would be zero, by the last two points, no further away than they can tell."""
    place, value = points[-1]
    slope = -1.0
    if len(points) > 1 and abs(place - points[-2][0]) > 1e-12:
        slope = (value - points[-2][1]) / (place - points[-2][0])
    step = -value / slope if slope < -0.05 else value
    largest = math.log(4) if len(points) > 1 else math.log(1000)  # the first guess may be far off, and one step scales
    return place + max(-largest, min(largest, step))


def differences(found: Recipe, stated: Recipe | None) -> str:
    """What a recipe says other than the stated one, as `--recipe` takes it.

    >>> differences(Recipe(learning_rate=0.1), Recipe(learning_rate=0.2))
    'learning_rate: 0.1'
    """
    always = ("batch_size", "local_steps", "epochs", "optimizer", "learning_rate")
    parts = []
    for name in (*always, "momentum", "batch_norm"):
        value = getattr(found, name)
        before = getattr(Recipe() if stated is None else stated, name)
        if value != before or (stated is None and name in always):
            parts.append(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    return ", ".join(parts)

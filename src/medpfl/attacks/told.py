"""What a malicious server tells clients beside the model, where the threat model lets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from medpfl.attacks.calibration import drawn_batches
from medpfl.attacks.crafted import ServerView
from medpfl.core.domain import Broadcast, Recipe
from medpfl.federation.client import client_step

TOLD = "the server told clients"
"""How notes begin that say what clients were told."""

ADAM_RATE = 1.0
"""Learning rate at which Adam's bounded steps are far above rounding and quantization."""

ROOM = 2.0
"""The clipping that is told leaves room for values of another round that are so much larger."""


def told_recipe(view: ServerView) -> Recipe | None:
    """The recipe that shows most: one local step over all images of a client, of Adam a large one.

    None where the server may not choose, or would choose what was agreed.
    """
    agreed = view.recipe
    if "recipe" not in view.can or agreed is None or agreed.update == "gradient":
        return None
    rate = agreed.learning_rate if agreed.optimizer == "sgd" else max(agreed.learning_rate, ADAM_RATE)
    told = replace(agreed, local_steps=1, epochs=1, batch_size=view.examples, learning_rate=rate)
    return None if told == agreed else told


def recipe_note(told: Recipe) -> str:
    """What clients were told, for the report."""
    return (
        f"{TOLD} to train in {told.local_steps} local step of {told.batch_size} images with learning "
        f"rate {told.learning_rate:g}"
    )


def with_fitted_aggregation(
    view: ServerView, broadcast: Broadcast, names: Sequence[str], generator: torch.Generator
) -> Broadcast:
    """The broadcast with parameters of the aggregation that fit what clients send of the tensors in `names`.

    The sizes are those of a step that the server plays through on auxiliary images with `view.recipe`. The broadcast
    itself where the server may not choose, or what is sent is not finite.
    """
    auxiliary, recipe = view.knowledge.auxiliary, view.recipe
    if "secure_aggregation" not in view.can or not view.channel.chosen_by_server or auxiliary is None or recipe is None:
        return broadcast
    (batch,) = drawn_batches(view, auxiliary, 1, generator)
    update, _ = client_step(broadcast.model(0), batch, recipe, generator=generator)
    sent = [update.trainable[name] for name in names]
    if recipe.update == "weights":
        sent += [model.parameters[name] for model in broadcast.models[1:] for name in names]
    largest = torch.stack([tensor.abs().max() for tensor in sent]).max()
    if not bool(torch.isfinite(largest)):
        return broadcast
    return replace(broadcast, aggregation=view.channel.fitted(ROOM * float(largest), view.examples))


def aggregation_note(broadcast: Broadcast) -> str:
    """What clients were told of the aggregation, for the report."""
    listed = ", ".join(f"{name} {value:.3g}" for name, value in broadcast.aggregation.items())
    return f"{TOLD} to aggregate with {listed}"

"""Training a model before it is audited, by the same local steps that clients take."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.devices import moved
from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.errors import DataError, ModelError
from medpfl.core.session import NO_SESSION, Session, State
from medpfl.federation.local import LocalState, local_step, start_local
from medpfl.federation.optimizers import OptimizerState

DEFAULT_EPOCHS = 5


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainingConfig:
    """How a model is trained before the audit: `state: {trained: {epochs: 5}}` or `{steps: 1}`.

    MedPFL prepares its CPL runs with `steps: 1, batch_size: 32, optimizer: adam, learning_rate: 0.01`.
    """

    epochs: Annotated[int | None, Field(ge=0, description="passes over the training images; 5 without `steps`")] = None
    steps: Annotated[int | None, Field(ge=0, description="optimizer steps, instead of epochs")] = None
    batch_size: Annotated[int, Field(ge=1, description="images per step; a last smaller batch is left out")] = 32
    learning_rate: Annotated[float, Field(gt=0, description="learning rate")] = 0.001
    optimizer: Annotated[Literal["sgd", "adam", "adamw"], Field(description="optimizer")] = "adam"
    momentum: Annotated[float, Field(ge=0, lt=1, description="SGD momentum")] = 0.0
    weight_decay: Annotated[float, Field(ge=0, description="L2 penalty (decoupled for adamw)")] = 0.0
    victims: Annotated[
        Literal["never", "included"],
        Field(description="whether the victims' images are trained on too, as in later rounds of a federation"),
    ] = "never"

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self

    def total_steps(self, images: int) -> int:
        """Optimizer steps on that many images.

        >>> TrainingConfig(epochs=3, batch_size=32).total_steps(100)
        9
        """
        return self.length if self.steps is not None else self.length * steps_per_epoch(images, self.batch_size)

    @property
    def length(self) -> int:
        """Steps where these were given, else epochs; 0 is a model as it was made."""
        if self.steps is not None:
            return self.steps
        return DEFAULT_EPOCHS if self.epochs is None else self.epochs

    def recipe(self, images: int) -> Recipe:
        """The recipe of one local step on that many training images."""
        return Recipe(
            update="weights",
            batch_size=min(self.batch_size, images),
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            batch_norm="train",
        )


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Full batches in one pass; one smaller batch if there are fewer images than that."""
    return max(1, images // batch_size)


def train(
    model: GlobalModel,
    images: Tensor,
    targets: Tensor,
    config: TrainingConfig,
    generator: torch.Generator,
    session: Session = NO_SESSION,
) -> tuple[GlobalModel, list[tuple[int, float]]]:
    """Trains on images (M, *image_shape) in [0, 1] in float32 and returns the model and (step, mean loss) of each step.

    The model may live on any device; the images may stay elsewhere. Every epoch visits the images in a new order drawn from `generator`. Batch norm is in train mode. Goes on from the
    session's last snapshot bit by bit. Raises `DataError` without images, `ModelError` if the loss stops being finite.
    """
    count = int(images.shape[0])
    if count == 0:
        raise DataError("state: trained needs images, but the pool's training part is empty: use more data")
    recipe = config.recipe(count)
    total, per_epoch = config.total_steps(count), steps_per_epoch(count, config.batch_size)
    model = model.to(torch.float32)
    local = start_local(model, recipe)
    order = torch.arange(count)
    history: list[tuple[int, float]] = []
    snapshot = session.restore()
    if snapshot is not None:
        model, local, order, history = _restored(snapshot, model)
        generator.set_state(snapshot["generator"])
    for step in range(len(history), total):
        position = step % per_epoch
        if position == 0:
            order = torch.randperm(count, generator=generator)
        chosen = order[position * recipe.batch_size : (position + 1) * recipe.batch_size]
        batch = moved(Batch(images[chosen].to(torch.float32), targets[chosen]), model.device)
        model, local, loss = local_step(model, batch, recipe, local, generator=generator)
        history.append((step + 1, float(loss)))
        if not math.isfinite(history[-1][1]):
            raise ModelError(
                f"training of model '{model.name}' diverged at step {step + 1} (loss {history[-1][1]}): "
                f"lower learning_rate: {config.learning_rate}"
            )
        session.checkpoint(step + 1, total, partial(_snapshot, model, local, order, history, generator))
    return model, history


def _snapshot(
    model: GlobalModel, local: LocalState, order: Tensor, history: list[tuple[int, float]], generator: torch.Generator
) -> State:
    return {
        "parameters": dict(model.parameters),
        "buffers": dict(model.buffers),
        "counters": dict(model.counters),
        "steps": local.optimizer.steps,
        "first": dict(local.optimizer.first),
        "second": dict(local.optimizer.second),
        "order": order,
        "losses": [loss for _, loss in history],
        "generator": generator.get_state(),
    }


def at_step(model: GlobalModel, snapshot: State) -> GlobalModel:
    """The model as it was when training took that snapshot, on its own device."""
    tensors = {part: snapshot[part] for part in ("parameters", "buffers", "counters")}
    return replace(model.to(torch.float32), **moved(tensors, model.device))


def _restored(snapshot: State, model: GlobalModel) -> tuple[GlobalModel, LocalState, Tensor, list[tuple[int, float]]]:
    model = at_step(model, snapshot)
    snapshot = moved(snapshot, model.device)
    optimizer = OptimizerState(snapshot["steps"], snapshot["first"], snapshot["second"])
    history = [(step, loss) for step, loss in enumerate(snapshot["losses"], start=1)]
    return model, LocalState(optimizer), snapshot["order"].cpu(), history

"""Several observations of one kind, stacked for the batched objective: models, targets and how clients trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from medpfl.attacks.matching.epochs import epoch_orders
from medpfl.attacks.updates import batch_norm_mode, change, gradient_view
from medpfl.core.domain import GlobalModel, Observation, Recipe
from medpfl.federation.hooks import NO_HOOKS, Hooks

Precision = Literal["float32", "float64"]


@dataclass(frozen=True)
class Problem:
    """What a search has to match, for V victims.

    models: one per victim, in the search's precision; the same object where victims share it. names: the trainable
    tensors. targets: (V, *shape) each, in the order of `names`. simulate: the recipe that candidates are trained with,
    or None where one gradient says it all. steps: gradients of one candidate per evaluation. copies: how many variables
    every private image has, one for each epoch of the simulated client or one in all.
    """

    models: tuple[GlobalModel, ...]
    names: tuple[str, ...]
    targets: tuple[Tensor, ...]
    batch_norm: Literal["train", "eval"]
    simulate: Recipe | None
    steps: int
    examples: int
    copies: int = 1
    hooks: Hooks = NO_HOOKS
    """What candidates' simulated local steps do beside the recipe."""

    @property
    def shared(self) -> bool:
        """Whether all victims received the same model."""
        return all(model is self.models[0] for model in self.models)

    @cached_property
    def taken(self) -> tuple[Tensor, ...] | None:
        """The variables that each local step of the simulated client takes, None for a gradient."""
        if self.simulate is None or self.simulate.update == "gradient":
            return None
        orders = epoch_orders(self.examples, self.simulate.epochs, self.copies)
        return tuple(step.to(self.device) for order in orders for step in torch.split(order, self.simulate.batch_size))

    @property
    def device(self) -> torch.device:
        """Where models, targets and candidates live."""
        return self.targets[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the search."""
        return self.targets[0].dtype

    def squared_norms(self, weights: Tensor) -> Tensor:
        """Squared norm of each victim's target over the tensors weighted by `weights` (V, tensors): (V,)."""
        squares = torch.stack([target.flatten(1).square().sum(dim=1) for target in self.targets], dim=1)
        return (squares * weights).sum(dim=1)


def build_problem(
    observations: Sequence[Observation],
    precision: Precision,
    separate_epochs: bool = False,
    defended: bool = False,
    hooks: Hooks = NO_HOOKS,
) -> Problem:
    """Stacks observations that share architecture, shapes, recipe and example count.

    separate_epochs: whether every epoch of a simulated client has images of its own. defended: a known defense is played
    on what candidates would have sent, so their weight decay is simulated too where it is not theirs to subtract. hooks:
    what a known defense does inside local steps, which are simulated for it.
    """
    first = observations[0]
    dtype = torch.float64 if precision == "float64" else torch.float32
    recipe = first.recipe
    decays = defended and recipe is not None and recipe.update != "gradient" and recipe.weight_decay > 0
    played = decays or hooks is not NO_HOOKS
    simulate = recipe if recipe is not None and (played or not is_one_gradient(recipe)) else None
    gradients = [gradient_view(one).tensors if simulate is None else _mean_step(one, simulate) for one in observations]
    names = tuple(first.update.trainable)
    return Problem(
        models=_in_precision([one.model for one in observations], dtype),
        names=names,
        targets=tuple(torch.stack([tensors[name] for tensors in gradients]).to(dtype) for name in names),
        batch_norm=batch_norm_mode(first.recipe),
        simulate=None if simulate is None else replace(simulate, precision=precision),
        steps=1 if simulate is None else simulate.local_steps * simulate.epochs,
        examples=first.examples,
        copies=simulate.epochs if separate_epochs and simulate is not None else 1,
        hooks=hooks,
    )


def earlier_targets(
    observations: Sequence[Observation],
    precision: Precision,
    separate_epochs: bool = False,
    defended: bool = False,
    hooks: Hooks = NO_HOOKS,
) -> tuple[tuple[Tensor, ...], ...]:
    """The targets that `build_problem` would make of each earlier round, the first one first."""
    rounds = zip(*(one.earlier for one in observations), strict=True)
    return tuple(
        build_problem(
            [replace(one, update=update, earlier=()) for one, update in zip(observations, updates, strict=True)],
            precision,
            separate_epochs,
            defended,
            hooks,
        ).targets
        for updates in rounds
    )


def is_one_gradient(recipe: Recipe) -> bool:
    """Whether the update is one gradient of the mean loss up to a known linear map, so that nothing is simulated."""
    if recipe.gradient_clip is not None or (recipe.accumulation > 1 and recipe.batch_norm == "train"):
        return False
    return recipe.update == "gradient" or (recipe.optimizer == "sgd" and recipe.local_steps * recipe.epochs == 1)


def _mean_step(observation: Observation, recipe: Recipe) -> dict[str, Tensor]:
    """The update in the units in which candidates are simulated: a gradient, or the mean step over -learning rate."""
    if observation.update.kind == "gradient":
        return {name: tensor.double() for name, tensor in observation.update.trainable.items()}
    factor = -1.0 / (recipe.learning_rate * recipe.local_steps * recipe.epochs)
    return {name: factor * tensor for name, tensor in change(observation).items()}


def _in_precision(models: Sequence[GlobalModel], dtype: torch.dtype) -> tuple[GlobalModel, ...]:
    """Each distinct model converted once."""
    converted: dict[int, GlobalModel] = {}
    for model in models:
        if id(model) not in converted:
            converted[id(model)] = model.to(dtype)
    return tuple(converted[id(model)] for model in models)

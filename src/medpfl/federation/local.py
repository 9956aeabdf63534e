"""One local optimizer step, and what a client carries from one to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from medpfl.core.devices import moved
from medpfl.core.domain import Batch, GlobalModel, Recipe, Tensors
from medpfl.federation.gradients import finished_gradient, step_gradient
from medpfl.federation.hooks import NO_HOOKS, Hooks, Step
from medpfl.federation.optimizers import OPTIMIZERS, OptimizerState

INITIAL_LOSS_SCALE = 65536.0
LOSS_SCALE_GROWTH_INTERVAL = 2000


@dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling of float16: the factor, and how many finite steps it has lasted."""

    factor: Tensor = field(default_factory=lambda: torch.tensor(INITIAL_LOSS_SCALE))
    finite_steps: Tensor = field(default_factory=lambda: torch.tensor(0))

    @staticmethod
    def on(device: torch.device) -> LossScale:
        """The scale before the first step, beside a model on this device."""
        return moved(LossScale(), device)

    def after(self, finite: Tensor) -> LossScale:
        """Halved after a step that overflowed, doubled after 2000 finite steps in a row."""
        steps = torch.where(finite, self.finite_steps + 1, 0)
        grows = steps >= LOSS_SCALE_GROWTH_INTERVAL
        factor = torch.where(finite, torch.where(grows, self.factor * 2, self.factor), self.factor / 2)
        return LossScale(factor, torch.where(grows, 0, steps))


@dataclass(frozen=True)
class LocalState:
    """What a client carries from one local step to the next, besides the model."""

    optimizer: OptimizerState
    loss_scale: LossScale | None = None


def start_local(model: GlobalModel, recipe: Recipe) -> LocalState:
    """The state before the first local step of a round."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.parameters.items()}
    return LocalState(
        optimizer=OptimizerState(
            steps=torch.zeros((), dtype=torch.int64, device=model.device), first=zeros, second=zeros
        ),
        loss_scale=LossScale.on(model.device) if recipe.precision == "float16" else None,
    )


def local_step(
    model: GlobalModel,
    batch: Batch,
    recipe: Recipe,
    local: LocalState,
    *,
    hooks: Hooks = NO_HOOKS,
    generator: torch.Generator,
) -> tuple[GlobalModel, LocalState, Tensor]:
    """One optimizer step on `batch`: the model with new parameters, buffers and counters, the state, the mean loss.

    In float16 the loss is scaled as by `torch.amp.GradScaler` with its defaults: a step whose gradient is not finite
    is skipped and halves the scale, 2000 finite steps in a row double it.
    """
    batch = hooks.batch(batch, model, generator)
    scale = local.loss_scale
    result = step_gradient(
        model, batch, recipe, hooks=hooks, generator=generator, loss_scale=None if scale is None else scale.factor
    )
    gradients: Tensors = result.gradients
    finite = None if scale is None else all_finite(gradients)
    if finite is not None:
        gradients = keep_where(finite, gradients, {name: torch.zeros_like(g) for name, g in gradients.items()})
    gradients = finished_gradient(Step(model, batch, recipe, gradients), hooks, generator)
    parameters, optimizer = OPTIMIZERS[recipe.optimizer](model.parameters, gradients, local.optimizer, recipe)
    if scale is not None and finite is not None:
        parameters = keep_where(finite, parameters, model.parameters)
        optimizer = OptimizerState(
            steps=torch.where(finite, optimizer.steps, local.optimizer.steps),
            first=keep_where(finite, optimizer.first, local.optimizer.first),
            second=keep_where(finite, optimizer.second, local.optimizer.second),
        )
        scale = scale.after(finite)
    return replace(result.model, parameters=parameters), LocalState(optimizer, scale), result.loss


def all_finite(tensors: Tensors) -> Tensor:
    """A boolean scalar: whether every entry of every tensor is finite."""
    return torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).all()


def keep_where(condition: Tensor, chosen: Mapping[str, Tensor], otherwise: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`chosen` where the boolean scalar `condition` holds, else `otherwise`; works under vmap."""
    return {name: torch.where(condition, tensor, otherwise[name]) for name, tensor in chosen.items()}

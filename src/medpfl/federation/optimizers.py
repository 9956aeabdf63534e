"""SGD, Adam and AdamW as pure functions, equal to `torch.optim` and differentiable in the gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.core.domain import Recipe, Tensors


@dataclass(frozen=True)
class OptimizerState:
    """Steps taken so far (integer scalar) and running averages by tensor name, zeros at the start.

    `first`: SGD's momentum buffer or Adam's first moment. `second`: Adam's second moment, unused by SGD.
    """

    steps: Tensor
    first: Tensors
    second: Tensors


OptimizerStep = Callable[[Tensors, Tensors, OptimizerState, Recipe], tuple[dict[str, Tensor], OptimizerState]]
"""(parameters, gradients, state, recipe) -> (new parameters, new state)."""


def sgd_step(
    parameters: Tensors, gradients: Tensors, state: OptimizerState, recipe: Recipe
) -> tuple[dict[str, Tensor], OptimizerState]:
    """`torch.optim.SGD` without dampening: starting from zeros, the first momentum buffer is the gradient itself."""
    directions: Tensors = _penalized(parameters, gradients, recipe)
    first = state.first
    if recipe.momentum:
        directions = {name: recipe.momentum * first[name] + directions[name] for name in parameters}
        first = directions
    updated = {name: parameter - recipe.learning_rate * directions[name] for name, parameter in parameters.items()}
    return updated, OptimizerState(state.steps + 1, first, state.second)


def adam_step(
    parameters: Tensors, gradients: Tensors, state: OptimizerState, recipe: Recipe
) -> tuple[dict[str, Tensor], OptimizerState]:
    """`torch.optim.Adam`: the penalty is added to the gradient."""
    return _adam(parameters, _penalized(parameters, gradients, recipe), state, recipe)


def adamw_step(
    parameters: Tensors, gradients: Tensors, state: OptimizerState, recipe: Recipe
) -> tuple[dict[str, Tensor], OptimizerState]:
    """`torch.optim.AdamW`: the parameters shrink by learning rate times weight decay before the step."""
    shrink = 1.0 - recipe.learning_rate * recipe.weight_decay
    return _adam({name: shrink * parameter for name, parameter in parameters.items()}, gradients, state, recipe)


OPTIMIZERS: dict[str, OptimizerStep] = {"sgd": sgd_step, "adam": adam_step, "adamw": adamw_step}


def _penalized(parameters: Tensors, gradients: Tensors, recipe: Recipe) -> Tensors:
    if not recipe.weight_decay:
        return gradients
    return {name: gradients[name] + recipe.weight_decay * parameters[name] for name in parameters}


def _adam(
    parameters: Tensors, gradients: Tensors, state: OptimizerState, recipe: Recipe
) -> tuple[dict[str, Tensor], OptimizerState]:
    decay1, decay2 = recipe.betas
    steps = state.steps + 1
    correction1 = 1.0 - decay1 ** steps.to(torch.float64)
    correction2 = 1.0 - decay2 ** steps.to(torch.float64)
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    updated: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        gradient = gradients[name]
        first[name] = torch.lerp(state.first[name], gradient, 1.0 - decay1)
        second[name] = torch.addcmul(decay2 * state.second[name], gradient, gradient, value=1.0 - decay2)
        denominator = root(second[name]) / correction2.sqrt().to(gradient.dtype) + recipe.epsilon
        step_size = (recipe.learning_rate / correction1).to(gradient.dtype)
        updated[name] = parameter - step_size * first[name] / denominator
    return updated, OptimizerState(steps, first, second)


def root(values: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0 instead of infinite, so that Adam stays differentiable there.

    >>> x = torch.zeros(1, requires_grad=True)
    >>> torch.autograd.grad(root(x).sum(), x)[0].item()
    0.0
    """
    positive = values > 0
    return torch.where(positive, torch.sqrt(torch.where(positive, values, 1.0)), 0.0)

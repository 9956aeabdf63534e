"""Adam undone: the gradient behind steps that started from zero moments."""

from __future__ import annotations

import torch
from torch import Tensor

from medpfl.core.domain import Recipe
from medpfl.federation.optimizers import OPTIMIZERS, OptimizerState

KNOWN = 0.01
"""Entries of the gradient whose relative error by rounding is larger count as lost."""

ROUNDED_WITHIN = 4.0
"""Relative rounding of a step inside the optimizer, in units of half the precision's last place."""

TABLE = torch.logspace(-12, 12, 4801, dtype=torch.float64)
"""Gradients in units of epsilon at which several steps are tabulated before Newton's method takes over."""

NEWTON_STEPS = 4


def adam_gradient(moved: Tensor, parameters: Tensor, recipe: Recipe, steps: int = 1) -> tuple[Tensor, Tensor]:
    """The first step's gradient (float64), and where its size is lost in rounding (bool), entry by entry.

    moved: new minus old of what was `parameters`, in float64. The first step of Adam from zero moments is
    -learning_rate * g / (|g| + epsilon) (Kingma and Ba 2015, algorithm 1, where the bias corrections cancel the decay
    rates), so |g| = epsilon * a / (1 - a) for a = |step| / learning_rate, with the sign turned. `steps` above 1: only the
    first of so many steps had a gradient, and its moments moved the parameters in all of them. Where a is so near to its
    largest value that rounding hides the rest, the size is the largest that could be told.

    >>> recipe = Recipe(update="delta", optimizer="adam", learning_rate=0.1, epsilon=1e-8)
    >>> step = torch.tensor([-0.1 * 3e-8 / (3e-8 + 1e-8), 0.0], dtype=torch.float64)
    >>> [f"{value:.4g}" for value in adam_gradient(step, torch.zeros(2), recipe)[0].tolist()]
    ['3e-08', '0']
    """
    old = parameters.double()
    shrink = 1.0 - recipe.learning_rate * recipe.weight_decay if recipe.optimizer == "adamw" else 1.0
    taken = (old * shrink**steps - old - moved) / recipe.learning_rate
    terms = _terms(recipe, steps, shrink)
    most = sum(first / second for first, second in terms)
    rounding = (_rounding(old, moved, recipe) / most).clamp_max(0.5)
    share = taken.abs() / most
    lost = (1.0 - share) * KNOWN < rounding
    size = _sizes((share.clamp_max(1.0 - rounding)) * most, terms)
    gradient = recipe.epsilon * size * taken.sign()
    if recipe.optimizer == "adam" and recipe.weight_decay:
        gradient = gradient - recipe.weight_decay * old
    return gradient, lost


def idle_change(parameters: Tensor, recipe: Recipe) -> Tensor:
    """How a client changes parameters (float64) that get no gradient in any of its steps: by weight decay alone."""
    if not recipe.weight_decay:
        return torch.zeros_like(parameters, dtype=torch.float64)
    zero = {"": torch.zeros_like(parameters)}
    now, state = {"": parameters}, OptimizerState(torch.zeros((), dtype=torch.int64), zero, zero)
    for _ in range(recipe.local_steps * recipe.epochs):
        now, state = OPTIMIZERS[recipe.optimizer](now, zero, state, recipe)
    return now[""].double() - parameters.double()


def _terms(recipe: Recipe, steps: int, shrink: float) -> list[tuple[float, float]]:
    """Step t moves by first_t * r / (second_t * r + 1) of the learning rate, for a gradient of r epsilons in step 1."""
    decay1, decay2 = recipe.betas
    found = []
    for step in range(1, steps + 1):
        first = (1 - decay1) * decay1 ** (step - 1) / (1 - decay1**step)
        second = ((1 - decay2) * decay2 ** (step - 1) / (1 - decay2**step)) ** 0.5
        found.append((first * shrink ** (steps - step), second))
    return found


def _rounding(old: Tensor, moved: Tensor, recipe: Recipe) -> Tensor:
    """How far rounding of the client's parameters and inside its optimizer moves a step, over the learning rate."""
    precision = torch.finfo(torch.float64 if recipe.precision == "float64" else torch.float32).eps / 2
    stored = torch.maximum(old.abs(), (old + moved).abs()) / recipe.learning_rate
    return precision * (stored + ROUNDED_WITHIN)


def _sizes(taken: Tensor, terms: list[tuple[float, float]]) -> Tensor:
    """The r at which the terms sum to `taken`, entry by entry."""
    if len(terms) == 1:
        return taken / (1.0 - taken)
    first, second = (torch.tensor(side, dtype=torch.float64, device=taken.device) for side in zip(*terms, strict=True))
    table = TABLE.to(taken.device)
    known = (first * table[:, None] / (second * table[:, None] + 1)).sum(dim=1)
    above = torch.searchsorted(known, taken.contiguous()).clamp(1, len(table) - 1)
    low, high = known[above - 1], known[above]
    size = torch.lerp(table[above - 1], table[above], ((taken - low) / (high - low)).clamp(0, 1))
    for _ in range(NEWTON_STEPS):
        value, slope = -taken, torch.zeros_like(taken)
        for one, other in terms:
            value = value + one * size / (other * size + 1)
            slope = slope + one / (other * size + 1) ** 2
        size = (size - value / slope).clamp_min(0)
    return size

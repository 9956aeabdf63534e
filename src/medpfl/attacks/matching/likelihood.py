"""From what a defense does to the distance that an adversary who knows it minimizes."""

from __future__ import annotations

from typing import Literal

from medpfl.core.domain import Recipe
from medpfl.core.mechanisms import GaussianNoise, LaplaceNoise, Mechanism

DistanceName = Literal["l2", "l1", "cosine", "layer_cosine", "layer_cosine_and_norm"]


def negative_log_likelihood(mechanism: Mechanism | None, recipe: Recipe | None) -> tuple[DistanceName, float]:
    """Distance and factor of the negative log likelihood of an update under known noise, up to a constant.

    Laplace noise of scale b: sum |g - G| / b. Gaussian noise of deviation s: sum (g - G)^2 / (2 s^2). Noise on weights or
    their change is noise on the mean gradient divided by learning rate * steps. Without known noise: sum (g - G)^2.

    >>> negative_log_likelihood(LaplaceNoise(0.1), Recipe())
    ('l1', 10.0)
    >>> negative_log_likelihood(GaussianNoise(0.1), Recipe(update="delta", learning_rate=0.1))[0]
    'l2'
    """
    unit = 1.0
    if recipe is not None and recipe.update != "gradient":
        unit = recipe.learning_rate * recipe.local_steps * recipe.epochs
    if isinstance(mechanism, LaplaceNoise):
        return "l1", unit / mechanism.scale
    if isinstance(mechanism, GaussianNoise):
        return "l2", 0.5 * (unit / mechanism.std) ** 2
    return "l2", 1.0

"""Clipping: a candidate's gradients are scaled down as the client's were, inside the forward model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from medpfl.attacks.matching.likelihoods.base import Likelihood, NotCombined, View, likelihood, likelihood_of
from medpfl.core.mechanisms import Clipped, ClippedSteps, Composed, GaussianNoise, Mechanism
from medpfl.core.recipes import Recipe
from medpfl.defenses import DPSGD
from medpfl.defenses.clipping import clipped, clipped_sum
from medpfl.federation.hooks import NO_HOOKS, Hooks

SAMPLED = "which images took part in which step was drawn by the client; candidates were trained as if the recipe had divided them"


@likelihood_of(Clipped)
def clipped_update(mechanism: Clipped, view: View) -> Likelihood:
    """All gradients times min(1, bound / their norm), the bound in units of a gradient."""
    bound = mechanism.bound / view.scale

    def transform(gradients: Sequence[Tensor], _targets: Sequence[Tensor]) -> list[Tensor]:
        return list(clipped(dict(zip(view.names, gradients, strict=True)), bound, mechanism.norm).values())

    return Likelihood(transform=transform)


@likelihood_of(ClippedSteps)
def clipped_steps(mechanism: ClippedSteps, view: View) -> Likelihood:
    """Normal noise of deviation multiplier * bound / (batch size * sqrt(steps)) on the mean of clipped gradients.

    Clipping acts inside the simulated local steps (`inside_steps`), or on the gradient itself where a round is one step
    of one image. Raises NotCombined where the recipe is withheld.
    """
    recipe = view.recipe
    if recipe is None:
        raise NotCombined(
            "noise on the sum of clipped gradients is over a batch size that a withheld recipe does not tell"
        )
    steps = recipe.local_steps * recipe.epochs
    noise = GaussianNoise(mechanism.noise_multiplier * mechanism.bound / recipe.batch_size)
    found = Likelihood()
    if mechanism.noise_multiplier > 0:
        sent = GaussianNoise(noise.std * view.scale / math.sqrt(steps))
        found = likelihood(sent, view)
    if mechanism.sampled and recipe.batch_size < view.examples:
        found = replace(found, notes=(*found.notes, SAMPLED))
    if not _of_one_image(recipe, view.examples):
        return found

    def transform(gradients: Sequence[Tensor], _targets: Sequence[Tensor]) -> list[Tensor]:
        alone = {name: gradient[None] for name, gradient in zip(view.names, gradients, strict=True)}
        summed = clipped_sum(alone, mechanism.bound, mechanism.per_tensor)
        return [tensor / recipe.batch_size for tensor in summed.values()]

    return replace(found, transform=transform)


def inside_steps(mechanism: Mechanism | None, recipe: Recipe | None, examples: int) -> Hooks:
    """What a known defense does inside every local step but for its noise, for the simulation of candidates.

    >>> inside_steps(ClippedSteps(0.5, 2.0), Recipe(batch_size=4), 4)
    DPSGD(bound=0.5, noise_multiplier=0.0, clipping='flat', sampling='recipe')
    """
    parts = mechanism.parts if isinstance(mechanism, Composed) else (mechanism,)
    clips = next((part for part in parts if isinstance(part, ClippedSteps)), None)
    if clips is None or recipe is None or _of_one_image(recipe, examples):
        return NO_HOOKS
    return replace(DPSGD.of(clips), noise_multiplier=0.0, sampling="recipe")


def only_scales(mechanism: Mechanism | None) -> bool:
    """Whether a known defense multiplies the whole update by one unknown number and does nothing else.

    Then the output error that the update shows is multiplied by it too, and who takes it as it is needs no more.
    """
    parts = mechanism.parts if isinstance(mechanism, Composed) else (mechanism,)
    return all(isinstance(part, Clipped) for part in parts)


def _of_one_image(recipe: Recipe, examples: int) -> bool:
    one_step = recipe.local_steps * recipe.epochs == 1 and (recipe.update == "gradient" or recipe.optimizer == "sgd")
    return examples == 1 and one_step

"""Which sizes of a crafted module an attacker tries, from what it knows of the clients' arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from medpfl.attacks.calibration import FINER, SCALES, Search, finer_scales
from medpfl.core.domain import Recipe

GAIN = 10.0
"""Where the gradient's size does not matter."""

ADAM_SCALE = 1e-2
"""First layers of this size are seen well beside Adam's steps, while gradients of all sizes are tried."""

ADAM_GAINS = tuple(10.0**power for power in range(1, -13, -1))
"""Among them are some that bring the gradient near Adam's epsilon, where a step shows its size."""

HALF_SCALES = {"float16": (1e-2, 1e-1, 1.0, 1e-3), "bfloat16": (1e-2, 1e-1, 1.0, 1e-4, 1e-6, 1e-8)}
HALF_GAINS = (1.0, 10.0, 100.0, 1000.0, 1e-2)
"""What is neither lost nor overflows in the narrow range of float16, nor rounded away from bfloat16."""


@dataclass(frozen=True)
class Sizes:
    """scale: size of the first layer's weights. gain: size of what the module adds to the image it shows the body."""

    scale: float
    gain: float


def sizes(recipe: Recipe | None, scale: float | None, gain: float | None) -> Search[Sizes]:
    """What to try for clients with this recipe; what is given is not sought.

    SGD keeps ratios whatever their size, so the gain is no matter. Adam's step shows a gradient's size only near its
    epsilon, and half precision has a narrow range: both sizes are sought together.
    """
    if recipe is not None and recipe.precision in HALF_SCALES:
        scales, gains = _given(scale, HALF_SCALES[recipe.precision]), _given(gain, HALF_GAINS)
    elif recipe is not None and recipe.update != "gradient" and recipe.optimizer != "sgd":
        scales, gains = _given(scale, (ADAM_SCALE,)), _given(gain, ADAM_GAINS)
    else:
        scales, gains = _given(scale, SCALES), (GAIN if gain is None else gain,)
    first = [Sizes(one, other) for one in scales for other in gains]

    return Search(first, around(scale is None, gain is None and len(gains) > 1))


def around(scale: bool, gain: bool) -> Callable[[Sizes], Sequence[Sizes]]:
    """What to try around the best sizes, of which scale or gain or both are sought."""

    def then(best: Sizes) -> Sequence[Sizes]:
        found = [replace(best, scale=value) for value in finer_scales(best.scale)] if scale else [best]
        found += [replace(best, gain=best.gain * by) for by in (FINER, 1 / FINER) if gain]
        return found if len(found) > 1 else ()

    return then


def called(search: Search[Sizes], chosen: Sizes) -> str:
    """What the report calls the sizes that were sought.

    >>> called(sizes(Recipe(), None, None), Sizes(0.01, GAIN))
    'scale 0.01'
    """
    if len({tried.gain for tried in search.first}) == 1:
        return f"scale {chosen.scale:g}"
    return f"scale and gain {chosen.scale:g} and {chosen.gain:g}"


def most_rounds(scale: float | None, gain: float | None) -> int:
    """How many rounds are simulated at most, whatever the recipe."""
    kinds = (Recipe(), Recipe(precision="bfloat16"), Recipe(update="delta", optimizer="adam"))
    return max(sizes(recipe, scale, gain).rounds for recipe in kinds)


def _given(value: float | None, otherwise: tuple[float, ...]) -> tuple[float, ...]:
    return otherwise if value is None else (value,)

"""What the defenses share that clip each image's gradient and add noise to the sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from medpfl.core.domain import ClientState, GlobalModel, Tensors, Update
from medpfl.core.guarantees import Guarantee, Release
from medpfl.core.recipes import Recipe
from medpfl.defenses.base import Defense, registered_name
from medpfl.defenses.clipping import clipped_sum
from medpfl.defenses.noise import noisy, normal
from medpfl.federation.changes import with_received_statistics

REMARKS = (
    "the number of images that is sent along, batch size and recipe lie outside the guarantee",
    "buffers and counters are sent as they were received, so they tell nothing",
    "a patient with k images is protected k times worse",
)


class PerExample(Defense):
    """A defense with a noise multiplier that clips each image's gradient in every local step."""

    clips_per_example = True
    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "maximum_a_posteriori"}

    noise_multiplier: float

    def update(
        self, update: Update, model: GlobalModel, state: ClientState, generator: torch.Generator
    ) -> tuple[Update, ClientState]:
        """The update without news of buffers and counters."""
        return with_received_statistics(update, model), state

    def refusals(self, model: GlobalModel, recipe: Recipe) -> list[str]:
        """Accumulation; batch norm in train mode is refused for all defenses that clip each image's gradient."""
        if recipe.accumulation == 1:
            return []
        return [
            f"{registered_name(self)}: accumulation: {recipe.accumulation} divides the batch of a step whose noise is drawn "
            "once; use accumulation: 1"
        ]

    def warnings(self) -> tuple[str, ...]:
        """Without noise there is no guarantee."""
        if self.noise_multiplier == 0:
            return ("clipping without noise gives no differential-privacy guarantee",)
        return ()


def noisy_mean(
    gradients: Tensors,
    bound: float,
    noise_multiplier: float,
    divisor: int,
    generator: torch.Generator,
    *,
    per_tensor: bool = False,
) -> Tensors:
    """The sum of per-example gradients (N, *shape) clipped to `bound`, plus Normal(0, (noise_multiplier bound)^2), over
    `divisor`, which must not depend on the images; N may be 0, and then it is noise alone.
    """
    total = clipped_sum(gradients, bound, per_tensor)
    if noise_multiplier > 0:
        total = noisy(total, normal(noise_multiplier * bound, generator))
    return {name: tensor / divisor for name, tensor in total.items()}


def image_guarantee(noise_multiplier: float, recipe: Recipe, images: int, *, sampled: bool) -> Guarantee | None:
    """What the local steps of a round release about one image; None without noise.

    sampled: every step draws each image on its own with probability batch size over images, which amplifies. If not,
    each image is in one step of every epoch, and the other steps follow from what is released already.
    """
    if noise_multiplier == 0:
        return None
    rate = min(1.0, recipe.batch_size / images) if sampled else 1.0
    steps = recipe.epochs * (recipe.local_steps if sampled else 1)
    release = Release("gaussian", noise_multiplier, rate, steps)
    return Guarantee("image", "add_or_remove" if sampled else "zero_out", (release,), remarks=REMARKS)

"""DP-SGD: per-example clipping and noise in every local step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.domain import Tensors
from medpfl.core.guarantees import Guarantee
from medpfl.core.mechanisms import ClippedSteps, Mechanism
from medpfl.core.recipes import Recipe
from medpfl.defenses.base import DEFENSES
from medpfl.defenses.per_example import PerExample, image_guarantee, noisy_mean


@DEFENSES.register(
    "dp_sgd",
    summary="each image's gradient clipped, one draw of normal noise on their sum, in every local step (example level)",
    paper="Abadi et al.: Deep Learning with Differential Privacy, CCS 2016",
    limits="batch norm in train mode is refused; the guarantee is per image, so a patient with k images has k times as much "
    "at stake; buffers and counters are sent as they were received; the number of images is sent in clear",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class DPSGD(PerExample):
    """(1) Each image joins a step on its own with probability batch_size / images. (2) Its gradient over all parameters is
    scaled to norm `bound` at most. (3) The sum gets Normal(0, (noise_multiplier * bound)^2), once, also when the step is
    empty. (4) It is divided by the batch size of the recipe, whatever was drawn (Abadi et al. 2016, algorithm 1).
    """

    bound: Annotated[float, Field(gt=0, description="largest norm of one image's gradient; .inf for no clipping")] = 1.0
    noise_multiplier: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, description="standard deviation of the noise on the sum, over the bound"),
    ] = 1.0
    clipping: Annotated[
        Literal["flat", "per_tensor"],
        Field(description="one norm over all tensors, or each tensor to bound / sqrt(number of tensors)"),
    ] = "flat"
    sampling: Annotated[
        Literal["poisson", "recipe"],
        Field(description="steps draw images at random, which amplifies privacy, or take them as the recipe says"),
    ] = "poisson"

    def __post_init__(self) -> None:
        if self.bound == float("inf") and self.noise_multiplier > 0:
            raise ValueError(
                "bound: .inf leaves nothing to calibrate noise to; use noise_multiplier: 0 or a finite bound"
            )

    @classmethod
    def of(cls, mechanism: ClippedSteps) -> DPSGD:
        """The defense with this mechanism."""
        return cls(
            bound=mechanism.bound,
            noise_multiplier=mechanism.noise_multiplier,
            clipping="per_tensor" if mechanism.per_tensor else "flat",
            sampling="poisson" if mechanism.sampled else "recipe",
        )

    def steps(self, images: int, recipe: Recipe, generator: torch.Generator) -> Sequence[Tensor] | None:
        """Which images join each step: drawn anew for every step, none left out or kept for later."""
        if self.sampling == "recipe":
            return None
        rate = min(1.0, recipe.batch_size / images)
        count = recipe.local_steps * recipe.epochs
        return [(torch.rand(images, generator=generator) < rate).nonzero().flatten() for _ in range(count)]

    def per_example(self, gradients: Tensors, recipe: Recipe, generator: torch.Generator) -> Tensors:
        """The noisy sum of clipped gradients over the expected batch size."""
        per_tensor = self.clipping == "per_tensor"
        return noisy_mean(
            gradients, self.bound, self.noise_multiplier, recipe.batch_size, generator, per_tensor=per_tensor
        )

    def mechanism(self) -> Mechanism:
        """Per-example clipping and noise in every step."""
        sampled = self.sampling == "poisson"
        return ClippedSteps(self.bound, self.noise_multiplier, self.clipping == "per_tensor", sampled)

    def guarantee(self, recipe: Recipe, images: int) -> Guarantee | None:
        """Per image; None without noise."""
        return image_guarantee(self.noise_multiplier, recipe, images, sampled=self.sampling == "poisson")

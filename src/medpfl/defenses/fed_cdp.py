"""Fed-CDP: per-example noise in every local iteration of a client, with bounds that fall over the rounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.core.domain import Tensors
from medpfl.core.guarantees import Guarantee
from medpfl.core.mechanisms import ClippedSteps, Mechanism
from medpfl.core.recipes import Recipe
from medpfl.defenses.base import DEFENSES
from medpfl.defenses.per_example import PerExample, image_guarantee, noisy_mean


@DEFENSES.register(
    "fed_cdp",
    summary="each image's gradient clipped tensor by tensor, normal noise on the sum of every local iteration, falling over "
    "the rounds",
    paper="Wei, Liu, Wu, Su, Iyengar: Gradient-Leakage Resilient Federated Learning, ICDCS 2021",
    limits="batch norm in train mode is refused; batches come as the recipe says, so nothing is amplified by sampling; late "
    "rounds, with the least noise, are the weakest; buffers and counters are sent as they were received",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class FedCDP(PerExample):
    """As DP-SGD with each tensor clipped to bound / sqrt(tensors), in every local iteration of the batches as they come.

    The decay variant lowers clipping bound and with it the noise from `bound` to `last_bound` linearly over `rounds`; the
    noise multiplier, and with it the guarantee of a round, stays. The published code clips each layer to the full bound;
    here all tensors together keep within it, so that the noise is what the multiplier says.
    """

    bound: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="largest norm of one image's gradient in the first round")
    ] = 4.0
    last_bound: Annotated[
        float | None,
        Field(gt=0, allow_inf_nan=False, description="the same from round `rounds` on; null: as in the first round"),
    ] = None
    rounds: Annotated[int, Field(ge=1, description="rounds over which the bound falls")] = 100
    noise_multiplier: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, description="standard deviation of the noise on the sum, over the bound"),
    ] = 6.0

    def in_round(self, number: int) -> FedCDP:
        """The same with the bound of this round.

        >>> FedCDP(bound=6.0, last_bound=2.0, rounds=4).in_round(2).bound
        4.0
        """
        if self.last_bound is None:
            return self
        gone = min(1.0, number / self.rounds)
        return replace(self, bound=self.bound + gone * (self.last_bound - self.bound), last_bound=None)

    def per_example(self, gradients: Tensors, recipe: Recipe, generator: torch.Generator) -> Tensors:
        """The noisy sum of clipped gradients over the recipe's batch size."""
        return noisy_mean(gradients, self.bound, self.noise_multiplier, recipe.batch_size, generator, per_tensor=True)

    def mechanism(self) -> Mechanism:
        """Per-example clipping and noise in every step, as in the first round."""
        return ClippedSteps(self.bound, self.noise_multiplier, per_tensor=True)

    def guarantee(self, recipe: Recipe, images: int) -> Guarantee | None:
        """Per image; None without noise."""
        return image_guarantee(self.noise_multiplier, recipe, images, sampled=False)

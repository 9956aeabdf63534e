"""CENSOR: a random direction orthogonal to the gradient, of the same norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.domain import Batch, GlobalModel, Recipe, Tensors
from medpfl.core.mechanisms import Mechanism, OrthogonalDirection
from medpfl.defenses.base import DEFENSES, Defense
from medpfl.federation.hooks import Step


@DEFENSES.register(
    "censor",
    summary="every step's gradient is replaced by the best of several random ones, orthogonal to it, of its norm",
    paper="Zhang et al.: CENSOR: Defense Against Gradient Inversion via Orthogonal Subspace Bayesian Sampling, NDSS 2025 "
    "(arXiv 2501.15718)",
    limits="norms of all tensors and one linear equation per tensor still show; training moves along random directions; "
    "a tensor with one entry has no orthogonal direction and becomes zero; no privacy guarantee",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Censor(Defense):
    """1. For each trial and each tensor g: normal noise r, r - g <r, g> / |g|^2, scaled to |g|. 2. The trial with the
    lowest loss of the client's own batch after a step of `step_size` along it is kept.

    The authors' code divides the projection by |g| in place of |g|^2, which is orthogonal only if |g| = 1.
    """

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "idlg", "distance": "likelihood", "total_variation": 1e-2}

    reads_images: ClassVar[bool] = True

    trials: Annotated[int, Field(ge=1, description="random directions that are tried")] = 20
    step_size: Annotated[float, Field(gt=0, description="step after which the local loss is compared")] = 1e-4

    def gradient(self, step: Step, generator: torch.Generator) -> Tensors:
        """The best of the trials."""
        if not len(step.batch):
            return step.gradients
        trials = [
            {name: orthogonal(tensor, generator) for name, tensor in step.gradients.items()} for _ in range(self.trials)
        ]
        losses = [self._loss(step.model, step.batch, step.recipe, trial) for trial in trials]
        best = min(range(self.trials), key=lambda place: losses[place])
        return trials[best]

    def mechanism(self) -> Mechanism:
        """An orthogonal direction."""
        return OrthogonalDirection()

    def warnings(self) -> tuple[str, ...]:
        """No guarantee, and what it does to training."""
        return (
            "CENSOR sends directions orthogonal to the gradient: there is no formal guarantee, and to first order a step "
            "along them does not lower the loss",
        )

    def _loss(self, model: GlobalModel, batch: Batch, recipe: Recipe, direction: Tensors) -> float:
        moved = {name: tensor - self.step_size * direction[name] for name, tensor in model.parameters.items()}
        with torch.no_grad():
            output, _ = model.forward(batch.images, parameters=moved, batch_norm=recipe.batch_norm)
            return float(model.task.loss(output, batch.targets))


def orthogonal(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A random tensor of the same norm whose inner product with `tensor` is zero; zero where there is none."""
    whole = tensor.double()
    square = whole.square().sum()
    if whole.numel() == 1 or not bool(square > 0):
        return torch.zeros_like(tensor)
    drawn = torch.randn(tensor.shape, dtype=torch.float64, generator=generator).to(tensor.device)
    for _ in range(2):  # once more for what rounding leaves
        drawn = drawn - whole * ((drawn * whole).sum() / square)
    found: Tensor = (drawn * (square.sqrt() / drawn.norm())).to(tensor.dtype)
    return found

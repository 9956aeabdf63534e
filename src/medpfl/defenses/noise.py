"""Independent noise on named tensors, always drawn in double precision and in the order of the tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from medpfl.core.domain import Tensors, Update

Draw = Callable[[torch.Size], Tensor]
"""Shape -> float64 noise of that shape."""

NO_GUARANTEE = (
    "{noise} noise without clipping of each image's gradient: nothing bounds what one image changes, so the noise "
    "gives no differential-privacy guarantee, and what is measured holds for the audited attacks only"
)


def normal(std: float, generator: torch.Generator) -> Draw:
    """Normal(0, std^2)."""
    return lambda shape: std * torch.randn(shape, dtype=torch.float64, generator=generator)


def laplacian(scale: float, generator: torch.Generator) -> Draw:
    """Laplace(0, scale), whose standard deviation is scale * sqrt(2)."""

    def draw(shape: torch.Size) -> Tensor:
        positive = torch.empty(shape, dtype=torch.float64).exponential_(generator=generator)
        negative = torch.empty(shape, dtype=torch.float64).exponential_(generator=generator)
        return scale * (positive - negative)

    return draw


def noisy(tensors: Tensors, draw: Draw) -> dict[str, Tensor]:
    """The tensors, each with noise of its own."""
    return {name: tensor + draw(tensor.shape).to(tensor) for name, tensor in tensors.items()}


def with_noise(update: Update, draw: Draw) -> Update:
    """The update with noise on every trainable tensor; buffers and counters stay."""
    return replace(update, trainable=noisy(update.trainable, draw))

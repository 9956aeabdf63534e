"""More auxiliary images out of few: each bent, shifted, mirrored, and made lighter or darker."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BEND, SHIFT, GAMMA = 0.12, 0.12, 0.3
"""How strongly images are varied: linear map, shift (of half a side), logarithm of the exponent."""


def varied(images: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Each image bent by a linear map near the identity, shifted, mirrored along its last axis half of the time, and
    made lighter or darker by an exponent; edges are continued. Images with two or three spatial dimensions. strength: of all but the mirroring.
    """
    count, dimensions = len(images), images.ndim - 2
    maps = torch.eye(dimensions) + strength * BEND * torch.randn(count, dimensions, dimensions, generator=generator)
    mirrored = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    maps[:, :, 0] = maps[:, :, 0] * mirrored[:, None]
    shifts = strength * SHIFT * (2.0 * torch.rand(count, dimensions, 1, generator=generator) - 1.0)
    exponents = torch.exp(strength * GAMMA * (2.0 * torch.rand(count, generator=generator) - 1.0))
    grid = F.affine_grid(torch.cat([maps, shifts], dim=2).to(images), list(images.shape), align_corners=False)
    bent = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return bent.clamp(1e-4, 1.0) ** exponents.to(images).reshape(-1, *(1 for _ in images.shape[1:]))

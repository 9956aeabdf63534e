"""Images that an attacker without any data makes up, to learn what a model's features and outputs are like."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

GROUPS = 8
PER_GROUP = 8
SMALL = 3 * 64 * 64
"""Images with more values than this come in half as many groups."""

COARSE = (2, 4, 8, 16)
"""Sides of the grids that are interpolated and added; each counts inversely to its side, as in natural images."""

INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def dummy_images(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """(groups, images, C, *spatial) in [0, 1], always the same ones.

    The first group is uniform noise. Each other group is like one kind of medical image: its own brightness, contrast
    and common structure, with smooth differences between its images.
    """
    generator = torch.Generator().manual_seed(0)
    count = GROUPS if torch.Size(shape).numel() <= SMALL else GROUPS // 2
    groups = [torch.rand((PER_GROUP, *shape), generator=generator)]
    for _ in range(count - 1):
        level, contrast, own = (float(value) for value in torch.rand(3, generator=generator))
        structure = _smooth(1, shape, generator) + (0.3 + 0.7 * own) * _smooth(PER_GROUP, shape, generator)
        brightness = 0.1 * torch.randn((PER_GROUP, *(1 for _ in shape)), generator=generator)
        image = 0.15 + 0.7 * level + brightness + (0.08 + 0.22 * contrast) * _unit(structure)
        groups.append(image.clamp(0.0, 1.0))
    return torch.stack(groups).to(dtype)


def _smooth(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random fields of mean 0 and deviation 1, alike but not equal in all channels."""
    channels, spatial = shape[0], shape[1:]
    total = torch.zeros((count, *shape))
    for side in COARSE:
        grid = (side,) * len(spatial)
        values = 0.5 * torch.randn((count, channels, *grid), generator=generator)
        values = values + torch.randn((count, 1, *grid), generator=generator)
        mode = INTERPOLATION[len(spatial)]
        total += 2.0 / side * functional.interpolate(values, size=spatial, mode=mode, align_corners=False)
    return _unit(total)


def _unit(fields: Tensor) -> Tensor:
    flat = fields.flatten(1)
    centered = flat - flat.mean(dim=1, keepdim=True)
    return (centered / centered.std(dim=1, keepdim=True).clamp_min(1e-6)).reshape(fields.shape)

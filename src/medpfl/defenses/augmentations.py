"""Operations on images (N, C, height, width) in [0, 1], each with a strength from 0 to 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

Operation = Callable[[Tensor, float], Tensor]


def _affine(images: Tensor, rows: tuple[tuple[float, float, float], tuple[float, float, float]]) -> Tensor:
    theta = torch.tensor(rows, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def _rotate(images: Tensor, strength: float) -> Tensor:
    angle = torch.tensor(strength * torch.pi / 4)
    cosine, sine = float(angle.cos()), float(angle.sin())
    return _affine(images, ((cosine, -sine, 0.0), (sine, cosine, 0.0)))


def _blurred(images: Tensor) -> Tensor:
    channels = images.shape[1]
    kernel = torch.full((channels, 1, 3, 3), 1 / 9, dtype=images.dtype, device=images.device)
    return functional.conv2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=channels)


def _contrast(images: Tensor, strength: float) -> Tensor:
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (1.0 - 0.9 * strength) * (images - mean)


def _posterize(images: Tensor, strength: float) -> Tensor:
    levels = 2.0 ** round(6 - 4 * strength)
    return (images * levels).floor().clamp_max(levels - 1) / (levels - 1)


OPERATIONS: Mapping[str, Operation] = {
    "invert": lambda images, strength: images + strength * (1.0 - 2.0 * images),
    "brightness": lambda images, strength: images * (1.0 - 0.8 * strength),
    "contrast": _contrast,
    "solarize": lambda images, strength: torch.where(images > 1.0 - 0.8 * strength, 1.0 - images, images),
    "posterize": _posterize,
    "sharpness": lambda images, strength: images + 2.0 * strength * (images - _blurred(images)),
    "shear": lambda images, strength: _affine(images, ((1.0, 0.6 * strength, 0.0), (0.0, 1.0, 0.0))),
    "translate_x": lambda images, strength: _affine(images, ((1.0, 0.0, 0.9 * strength), (0.0, 1.0, 0.0))),
    "translate_y": lambda images, strength: _affine(images, ((1.0, 0.0, 0.0), (0.0, 1.0, 0.9 * strength))),
    "rotate": _rotate,
}
"""Operations by name; `_affine` ones fill what comes from outside with black."""

STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)

TABLE: tuple[tuple[str, float], ...] = tuple((name, strength) for name in OPERATIONS for strength in STRENGTHS)
"""Fifty operations with their strengths, by number."""


def applied(images: Tensor, sequence: tuple[int, ...]) -> Tensor:
    """Images after the operations with these numbers, in order, in [0, 1] after each.

    >>> float(applied(torch.zeros(1, 1, 4, 4), (4,)).mean())
    1.0
    """
    for number in sequence:
        name, strength = TABLE[number]
        images = OPERATIONS[name](images, strength).clamp(0.0, 1.0)
    return images


def parse_policy(text: str) -> tuple[tuple[int, ...], ...]:
    """`3-1-7+43-18-18`: sequences of numbers of `TABLE`, divided by `+`. Raises ValueError for anything else.

    >>> parse_policy("3-1+43")
    ((3, 1), (43,))
    """
    try:
        found = tuple(tuple(int(number) for number in part.split("-")) for part in text.split("+"))
    except ValueError:
        raise ValueError(f"expected numbers such as 3-1-7+43-18-18, found '{text}'") from None
    if any(not 0 <= number < len(TABLE) for sequence in found for number in sequence):
        raise ValueError(f"operations have numbers from 0 to {len(TABLE) - 1}, found '{text}'")
    return found

"""Grey crops of the photographs that come with scikit-image, as a control for medical images."""

from __future__ import annotations

from math import exp, log

import torch
import torch.nn.functional as F
from skimage import color, data
from torch import Tensor

VICTIMS = ("camera", "chelsea", "rocket")
"""Photographs whose crops are attacked, or that settings are chosen on."""

AUXILIARY = ("astronaut", "coffee", "coins")
"""Photographs whose crops an attacker owns."""

ATTACKED, OWNED = 28, 68
"""Crops of either."""

SMALLEST, LARGEST = 96, 256
"""Sides of crops before they are made 32x32."""

CLASSES = 4


COLORED = ("astronaut", "coffee", "chelsea", "rocket")
"""Photographs in color."""


def photograph_crops(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(96, 1, 32, 32) in [0, 1] and labels that mean nothing; the first 28 are of other photographs than the rest."""
    crops = [_crop(VICTIMS[place % len(VICTIMS)], generator) for place in range(ATTACKED)]
    crops += [_crop(AUXILIARY[place % len(AUXILIARY)], generator) for place in range(OWNED)]
    return torch.stack(crops), torch.arange(len(crops)) % CLASSES


def colored_crops(count: int, generator: torch.Generator) -> Tensor:
    """(count, 3, 32, 32) in [0, 1]."""
    return torch.stack([_crop(COLORED[place % len(COLORED)], generator, gray=False) for place in range(count)])


def _crop(name: str, generator: torch.Generator, gray: bool = True) -> Tensor:
    picture = getattr(data, name)()
    picture = picture[..., None] if picture.ndim == 2 else color.rgb2gray(picture)[..., None] if gray else picture
    whole = torch.from_numpy(picture).movedim(-1, 0).float() / (1.0 if picture.dtype.kind == "f" else 255.0)
    share = float(torch.rand((), generator=generator))
    side = min(int(exp(log(SMALLEST) + share * log(LARGEST / SMALLEST))), *whole.shape[1:])
    top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in whole.shape[1:])
    return F.interpolate(whole[None, :, top : top + side, left : left + side], size=(32, 32), mode="area")[0]

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


def photograph_crops(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(96, 1, 32, 32) in [0, 1] and labels that mean nothing; the first 28 are of other photographs than the rest."""
    crops = [_crop(VICTIMS[place % len(VICTIMS)], generator) for place in range(ATTACKED)]
    crops += [_crop(AUXILIARY[place % len(AUXILIARY)], generator) for place in range(OWNED)]
    return torch.stack(crops), torch.arange(len(crops)) % CLASSES


def _crop(name: str, generator: torch.Generator) -> Tensor:
    picture = getattr(data, name)()
    grey = color.rgb2gray(picture) if picture.ndim == 3 else picture / 255.0
    whole = torch.from_numpy(grey).float()
    share = float(torch.rand((), generator=generator))
    side = min(int(exp(log(SMALLEST) + share * log(LARGEST / SMALLEST))), *whole.shape)
    top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in whole.shape)
    return F.interpolate(whole[None, None, top : top + side, left : left + side], size=(32, 32), mode="area")[0]

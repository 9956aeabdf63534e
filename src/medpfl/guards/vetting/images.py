"""Images to try a model on where nobody gave any: drawn ones, from dark to bright."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from medpfl.core.errors import ModelError
from medpfl.data.readers.phantom import PhantomReader
from medpfl.data.resizing import resize

BRIGHTEST = 0.8
"""Value of the background of the brightest image; that of the darkest is 0."""


def drawn_images(image_shape: tuple[int, ...], count: int) -> Tensor:
    """`count` drawn images (count, *image_shape) of different anatomy and brightness, always the same ones.

    Brain sections, in color skin lesions, for volumes brain sections that fade along the depth. Every image has its own
    brightness, from dark to bright, so that thresholds on brightness meet images on both sides.
    """
    channels, *spatial = image_shape
    if len(spatial) not in (2, 3) or min(image_shape) < 1:
        raise ModelError(f"images of shape {tuple(image_shape)} cannot be drawn: give images of your own")
    kind: Literal["skin", "brain"] = "skin" if channels == 3 else "brain"
    reader = PhantomReader(kind=kind, count=count, resolution=max(16, min(128, max(spatial[-2:]))))
    found = []
    for place, sample in enumerate(reader.read()):
        image = resize(sample.image, tuple(spatial[-2:]))
        if image.shape[0] != channels:
            image = image.mean(dim=0, keepdim=True).expand(channels, *image.shape[1:])
        if len(spatial) == 3:
            depth = torch.linspace(-1.0, 1.0, spatial[0]).square()
            image = image[:, None] * (1.0 - 0.5 * depth).reshape(1, -1, 1, 1)
        floor = BRIGHTEST * place / max(1, count - 1)
        found.append(floor + (1.0 - floor) * image)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return torch.stack(found)[order]

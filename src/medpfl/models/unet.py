"""A small U-Net for segmentation, without normalization layers, that needs nothing but PyTorch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from medpfl.models.randomness import isolated_randomness
from medpfl.models.registry import MODELS, SEGMENTATION
from medpfl.models.shapes import CONVOLUTIONS, MAX_POOLINGS, TRANSPOSED_CONVOLUTIONS, check_divisible, check_spatial

LEVELS = 2
"""Halvings of the image, each undone on the way up."""

WIDTH = 16
"""Channels at full size, doubled by every halving."""


class SmallUNet(nn.Module):
    """Two convolutions per level, max pooling down, transposed convolutions up, skip connections, a 1x1 head.

    Images (N, C, *spatial) with two or three spatial dimensions -> scores (N, classes, *spatial).
    """

    def __init__(self, channels: int, classes: int, dimensions: int) -> None:
        super().__init__()
        widths = [WIDTH * 2**level for level in range(LEVELS + 1)]
        pairs = list(pairwise(widths))
        self.pooling = MAX_POOLINGS[dimensions](2)
        self.first = _block(channels, WIDTH, dimensions)
        self.down = nn.ModuleList(_block(fine, coarse, dimensions) for fine, coarse in pairs)
        up = TRANSPOSED_CONVOLUTIONS[dimensions]
        self.up = nn.ModuleList(up(coarse, fine, 2, stride=2) for fine, coarse in reversed(pairs))
        self.merge = nn.ModuleList(_block(2 * fine, fine, dimensions) for fine, _ in reversed(pairs))
        self.head = CONVOLUTIONS[dimensions](WIDTH, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Scores per class and pixel."""
        levels = [self.first(images)]
        for block in self.down:
            levels.append(block(self.pooling(levels[-1])))
        values = levels.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            values = merge(torch.cat([levels.pop(), up(values)], dim=1))
        output: Tensor = self.head(values)
        return output


def _block(inputs: int, outputs: int, dimensions: int) -> nn.Sequential:
    """Two convolutions of three pixels that keep the size, each with ReLU."""
    convolution = CONVOLUTIONS[dimensions]
    return nn.Sequential(
        convolution(inputs, outputs, 3, padding=1), nn.ReLU(), convolution(outputs, outputs, 3, padding=1), nn.ReLU()
    )


@MODELS.register(
    "unet_small",
    summary="U-Net for segmentation with 16, 32 and 64 channels: two halvings, transposed convolutions, ReLU, no norm",
    paper="Ronneberger, Fischer, Brox: U-Net: Convolutional Networks for Biomedical Image Segmentation, MICCAI 2015; "
    "here padded and with a quarter of its width and half of its depth",
    limits="data with masks; two or three spatial dimensions, each divisible by 4",
)
def unet_small(image_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
    """Small U-Net, initialized as PyTorch does; for images and volumes."""
    shape = check_spatial("unet_small", image_shape, (2, 3), smallest=8)
    check_divisible("unet_small", shape, 2**LEVELS)
    with isolated_randomness(generator):
        return SmallUNet(shape[0], classes, len(shape) - 1)


SEGMENTATION.add("unet_small")

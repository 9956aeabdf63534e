"""Small convolutional classifiers of federated-learning baselines: ReLU, max pooling, no batch norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medpfl.models.randomness import isolated_randomness
from medpfl.models.registry import MODELS
from medpfl.models.shapes import CONVOLUTIONS, MAX_POOLINGS, check_spatial


class PoolingNet(nn.Module):
    """Convolutions that keep the size, each with ReLU and max pooling that halves it, then dense layers.

    Images (N, C, *spatial) with two or three spatial dimensions -> outputs (N, classes). `hidden` is the width of a
    dense layer with ReLU before the last one, 0 for none.
    """

    def __init__(
        self, image_shape: tuple[int, ...], classes: int, *, widths: Sequence[int], kernel: int, hidden: int
    ) -> None:
        super().__init__()
        channels, sides = image_shape[0], list(image_shape[1:])
        convolution, pooling = CONVOLUTIONS[len(sides)], MAX_POOLINGS[len(sides)]
        layers: list[nn.Module] = []
        for width in widths:
            layers += [convolution(channels, width, kernel, padding=kernel // 2), nn.ReLU(), pooling(2)]
            channels, sides = width, [side // 2 for side in sides]
        self.body = nn.Sequential(*layers)
        features = int(torch.Size([channels, *sides]).numel())
        self.hidden = nn.Sequential(nn.Linear(features, hidden), nn.ReLU()) if hidden else nn.Identity()
        self.fc = nn.Linear(hidden or features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Outputs (N, classes)."""
        output: Tensor = self.fc(self.hidden(self.body(images).flatten(1)))
        return output


@MODELS.register(
    "cnn_fedavg",
    summary="CNN of FedAvg: 2 convolutions 5x5 (32, 64 channels), ReLU and 2x2 max pooling, dense layer of 512 units",
    paper="McMahan et al.: Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017, "
    "section 3",
    limits="two or three spatial dimensions of at least 4 pixels",
)
def cnn_fedavg(image_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
    """CNN of FedAvg, initialized as PyTorch does. For ten classes of 1x28x28 it has the published 1,663,370 entries."""
    shape = check_spatial("cnn_fedavg", image_shape, (2, 3), smallest=4)
    with isolated_randomness(generator):
        return PoolingNet(shape, classes, widths=(32, 64), kernel=5, hidden=512)


@MODELS.register(
    "cnn3",
    summary="three convolutions 3x3 (32, 64, 128 channels), ReLU and 2x2 max pooling after each, one dense layer",
    paper="no single one: the plain 3-layer CNN that federated baselines on MedMNIST train, built as in McMahan et al. "
    "2017 with one convolution more and 3x3 kernels",
    limits="two or three spatial dimensions of at least 8 pixels",
)
def cnn3(image_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
    """Three-layer CNN without batch norm, initialized as PyTorch does; for images and for small volumes."""
    shape = check_spatial("cnn3", image_shape, (2, 3), smallest=8)
    with isolated_randomness(generator):
        return PoolingNet(shape, classes, widths=(32, 64, 128), kernel=3, hidden=0)

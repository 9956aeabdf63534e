"""The LeNets of DLG, iDLG and CPL: convolutions with sigmoids, one dense layer, uniform(-0.5, 0.5) everywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medpfl.core.errors import ModelError
from medpfl.models.randomness import isolated_randomness
from medpfl.models.registry import MODELS


class SigmoidNet(nn.Module):
    """Convolutions of equal width, a sigmoid after each, and one dense layer on the flattened features.

    Images (N, C, H, W) -> outputs (N, classes). The dense layer's size follows from the image size.
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        classes: int,
        *,
        width: int,
        kernel: int,
        padding: int,
        strides: tuple[int, ...],
    ) -> None:
        super().__init__()
        channels, height, rows = image_shape
        layers: list[nn.Module] = []
        for stride in strides:
            layers += [nn.Conv2d(channels, width, kernel, stride=stride, padding=padding), nn.Sigmoid()]
            channels = width
            height, rows = ((size + 2 * padding - kernel) // stride + 1 for size in (height, rows))
        self.body = nn.Sequential(*layers)
        self.fc = nn.Linear(width * height * rows, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Outputs (N, classes)."""
        output: Tensor = self.fc(self.body(images).flatten(1))
        return output


def uniform_half(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draws every weight and bias from uniform(-0.5, 0.5), in the module's order, and returns the module."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    return module


def two_dimensional(name: str, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """`image_shape` if it is (C, H, W) without zeros; raises `ModelError` otherwise."""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ModelError(f"model '{name}' takes images of shape (channels, height, width), found {image_shape}")
    return image_shape


@MODELS.register(
    "lenet_dlg",
    summary="LeNet of DLG: 4 convolutions 5x5, 12 channels, strides 2, 2, 1, 1, sigmoids; uniform(-0.5, 0.5)",
    paper="Zhu, Liu, Han: Deep Leakage from Gradients, NeurIPS 2019",
    limits="two spatial dimensions",
)
def lenet_dlg(image_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
    """LeNet of DLG. At 32x32 the dense layer has 768 inputs."""
    shape = two_dimensional("lenet_dlg", image_shape)
    with isolated_randomness(generator):
        net = SigmoidNet(shape, classes, width=12, kernel=5, padding=2, strides=(2, 2, 1, 1))
    return uniform_half(net, generator)


@MODELS.register(
    "lenet_idlg",
    summary="LeNet of iDLG: 3 convolutions 5x5, 12 channels, strides 2, 2, 1, sigmoids; uniform(-0.5, 0.5)",
    paper="Zhao, Mopuri, Bilen: iDLG: Improved Deep Leakage from Gradients, 2020",
    limits="two spatial dimensions",
)
def lenet_idlg(image_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
    """LeNet of iDLG. At 32x32 the dense layer has 768 inputs."""
    shape = two_dimensional("lenet_idlg", image_shape)
    with isolated_randomness(generator):
        net = SigmoidNet(shape, classes, width=12, kernel=5, padding=2, strides=(2, 2, 1))
    return uniform_half(net, generator)


@MODELS.register(
    "lenet_cpl",
    summary="Net of MedPFL's CPL runs: 6 convolutions 2x2, padding 2, 16 channels, sigmoids; uniform(-0.5, 0.5)",
    paper="Das, Amini, Wu: Privacy Risks Analysis and Mitigation in Federated Learning for Medical Images, BIBM 2023",
    limits="two spatial dimensions",
)
def lenet_cpl(image_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
    """Six-convolution net of MedPFL's CPL runs. At 32x32 the dense layer has 40000 inputs."""
    shape = two_dimensional("lenet_cpl", image_shape)
    with isolated_randomness(generator):
        net = SigmoidNet(shape, classes, width=16, kernel=2, padding=2, strides=(1,) * 6)
    return uniform_half(net, generator)

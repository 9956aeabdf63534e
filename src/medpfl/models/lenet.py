"""The LeNets of DLG, iDLG and CPL: convolutions with sigmoids, one dense layer, uniform(-0.5, 0.5) everywhere."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from medpfl.models.randomness import isolated_randomness
from medpfl.models.registry import MODELS
from medpfl.models.shapes import CONVOLUTIONS, check_spatial


class SigmoidNet(nn.Module):
    """Convolutions of equal width, a sigmoid after each, and one dense layer on the flattened features.

    Images (N, C, *spatial) with two or three spatial dimensions -> outputs (N, classes). The dense layer's size follows
    from the image size.
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
        channels, sides = image_shape[0], list(image_shape[1:])
        convolution = CONVOLUTIONS[len(sides)]
        layers: list[nn.Module] = []
        for stride in strides:
            layers += [convolution(channels, width, kernel, stride=stride, padding=padding), nn.Sigmoid()]
            channels = width
            sides = [(side + 2 * padding - kernel) // stride + 1 for side in sides]
        self.body = nn.Sequential(*layers)
        self.fc = nn.Linear(width * prod(sides), classes)

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


@MODELS.register(
    "lenet_dlg",
    summary="LeNet of DLG: 4 convolutions 5x5, 12 channels, strides 2, 2, 1, 1, sigmoids; uniform(-0.5, 0.5)",
    paper="Zhu, Liu, Han: Deep Leakage from Gradients, NeurIPS 2019",
    limits="two or three spatial dimensions",
)
def lenet_dlg(image_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
    """LeNet of DLG. At 32x32 the dense layer has 768 inputs."""
    shape = check_spatial("lenet_dlg", image_shape, (2, 3))
    with isolated_randomness(generator):
        net = SigmoidNet(shape, classes, width=12, kernel=5, padding=2, strides=(2, 2, 1, 1))
    return uniform_half(net, generator)


@MODELS.register(
    "lenet_idlg",
    summary="LeNet of iDLG: 3 convolutions 5x5, 12 channels, strides 2, 2, 1, sigmoids; uniform(-0.5, 0.5)",
    paper="Zhao, Mopuri, Bilen: iDLG: Improved Deep Leakage from Gradients, 2020",
    limits="two or three spatial dimensions",
)
def lenet_idlg(image_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
    """LeNet of iDLG. At 32x32 the dense layer has 768 inputs."""
    shape = check_spatial("lenet_idlg", image_shape, (2, 3))
    with isolated_randomness(generator):
        net = SigmoidNet(shape, classes, width=12, kernel=5, padding=2, strides=(2, 2, 1))
    return uniform_half(net, generator)


@MODELS.register(
    "lenet_cpl",
    summary="Net of MedPFL's CPL runs: 6 convolutions 2x2, padding 2, 16 channels, sigmoids; uniform(-0.5, 0.5)",
    paper="Das, Amini, Wu: Privacy Risks Analysis and Mitigation in Federated Learning for Medical Images, BIBM 2023",
    limits="two or three spatial dimensions",
)
def lenet_cpl(image_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
    """Six-convolution net of MedPFL's CPL runs. At 32x32 the dense layer has 40000 inputs."""
    shape = check_spatial("lenet_cpl", image_shape, (2, 3))
    with isolated_randomness(generator):
        net = SigmoidNet(shape, classes, width=16, kernel=2, padding=2, strides=(1,) * 6)
    return uniform_half(net, generator)

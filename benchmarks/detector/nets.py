"""Architectures on which no threshold of a guard was fixed: none is in the zoo, and all are common in practice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Factory = Callable[[int, int, int], nn.Module]
"""Channels, side and classes to a net that is initialized from PyTorch's global generator."""

OWN: dict[str, Factory] = {}


def own(factory: Factory) -> Factory:
    """Adds a factory under its name."""
    OWN[factory.__name__] = factory
    return factory


def mlp_of(widths: Sequence[int], activation: type[nn.Module]) -> Factory:
    """Dense layers only."""

    def made(channels: int, side: int, classes: int) -> nn.Module:
        sizes = [channels * side * side, *widths]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, units in pairwise(sizes):
            layers += [nn.Linear(inputs, units), activation()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))

    return made


OWN["mlp_relu"] = mlp_of((256, 128), nn.ReLU)
OWN["mlp_wide"] = mlp_of((512,), nn.ReLU)
OWN["mlp_gelu"] = mlp_of((200, 100, 50), nn.GELU)
OWN["mlp_tanh"] = mlp_of((128, 64), nn.Tanh)


@own
def lenet5(channels: int, side: int, classes: int) -> nn.Module:
    """LeNet-5 of 1998: tanh, mean pooling, three dense layers."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(16 * ((side // 2 - 4) // 2) ** 2, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh()),
        nn.Linear(84, classes),
    )


@own
def vgg_bn(channels: int, side: int, classes: int) -> nn.Module:
    """VGG in small: pairs of convolutions with batch norm, two hidden dense layers."""
    layers: list[nn.Module] = []
    for width in (16, 32, 64):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    features = 64 * (side // 8) ** 2
    dense = (nn.Linear(features, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, classes))
    return nn.Sequential(*layers, nn.Flatten(), *dense)


@own
def alexnet_small(channels: int, _side: int, classes: int) -> nn.Module:
    """AlexNet in small: large first kernels, wide dense layers, no norm."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 24, 7, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(24, 48, 5, padding=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()),
        *(nn.Linear(768, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, classes)),
    )


@own
def all_convolutional(channels: int, _side: int, classes: int) -> nn.Module:
    """Strided convolutions with leaky ReLU and a mean over positions."""
    layers: list[nn.Module] = []
    for width in (24, 48, 96):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.LeakyReLU(0.1)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, classes))


@own
def separable(channels: int, _side: int, classes: int) -> nn.Module:
    """MobileNet in small: depthwise and pointwise convolutions, batch norm, ReLU6."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)]
    inputs = 16
    for width in (32, 64, 64):
        layers += [nn.ReLU6(), nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)]
        layers += [nn.BatchNorm2d(inputs), nn.ReLU6(), nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)]
        inputs = width
    return nn.Sequential(*layers, nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


@own
def strided(channels: int, side: int, classes: int) -> nn.Module:
    """A strided convolution, one that keeps the size, a hidden dense layer; no pooling."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * (side // 2) ** 2, 256), nn.ReLU(), nn.Linear(256, classes)),
    )


@own
def shallow(channels: int, side: int, classes: int) -> nn.Module:
    """One convolution and a hidden dense layer."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(12 * (side // 2) ** 2, 128), nn.ReLU(), nn.Linear(128, classes)),
    )


class _NextBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, images: Tensor) -> Tensor:
        inner = self.norm(self.depthwise(images).movedim(1, -1))
        added: Tensor = self.down(F.gelu(self.up(inner))).movedim(-1, 1)
        return images + added


@own
def convnext_small(channels: int, _side: int, classes: int) -> nn.Module:
    """ConvNeXt in small: patches, depthwise 5x5, layer norm, GELU."""
    blocks = [_NextBlock(32), _NextBlock(32)]
    return nn.Sequential(
        nn.Conv2d(channels, 32, 4, stride=4), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes)
    )


class _MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_tokens = nn.Sequential(nn.Linear(tokens, 64), nn.GELU(), nn.Linear(64, tokens))
        self.over_width = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.over_tokens(self.first(tokens).transpose(1, 2)).transpose(1, 2)
        added: Tensor = self.over_width(self.second(tokens))
        return tokens + added


class _Mixer(nn.Module):
    def __init__(self, channels: int, side: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, 48, 4, stride=4)
        self.blocks = nn.Sequential(*[_MixerBlock((side // 4) ** 2, 48) for _ in range(2)])
        self.head = nn.Linear(48, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.blocks(self.patches(images).flatten(2).transpose(1, 2))
        output: Tensor = self.head(tokens.mean(dim=1))
        return output


@own
def mixer(channels: int, side: int, classes: int) -> nn.Module:
    """MLP-Mixer in small: dense layers over tokens and over channels in turn."""
    return _Mixer(channels, side, classes)


class _Gated(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, width, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, width)
        self.gate = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width), nn.Sigmoid())

    def forward(self, images: Tensor) -> Tensor:
        found = F.relu(self.norm(self.convolution(images)))
        weighted: Tensor = found * self.gate(found.mean(dim=(2, 3)))[:, :, None, None]
        return weighted


@own
def gated(channels: int, _side: int, classes: int) -> nn.Module:
    """Squeeze-and-excitation with group norm."""
    body = [_Gated(channels, 16), _Gated(16, 32), _Gated(32, 64)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


DENSE_FIRST = frozenset({"mlp_relu", "mlp_wide", "mlp_gelu", "mlp_tanh"})
"""Architectures whose first layer is dense: they leak without any crafting, and a guard that says so is right."""


def built(name: str, channels: int, side: int, classes: int, generator: torch.Generator) -> nn.Module:
    """One of these nets, initialized from `generator`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return OWN[name](channels, side, classes)

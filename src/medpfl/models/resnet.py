"""ResNet18 with the ImageNet stem and with a 3x3 stem for small images; state-dict names are torchvision's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medpfl.models.randomness import isolated_randomness
from medpfl.models.registry import MODELS
from medpfl.models.shapes import check_spatial

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))
"""Width and stride of the four stages of two blocks each."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside an identity or a 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, features: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        shortcut = features if self.downsample is None else self.downsample(features)
        inner = self.relu(self.bn1(self.conv1(features)))
        output: Tensor = self.relu(self.bn2(self.conv2(inner)) + shortcut)
        return output


class ResNet18(nn.Module):
    """He et al. 2015, 18 layers. Images (N, C, H, W) -> outputs (N, classes)."""

    def __init__(self, channels: int, classes: int, *, small_images: bool) -> None:
        super().__init__()
        if small_images:
            self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool: nn.Module = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        inputs = 64
        for number, (outputs, stride) in enumerate(STAGES, start=1):
            stage = nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1))
            self.add_module(f"layer{number}", stage)
            inputs = outputs
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Outputs (N, classes)."""
        features = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for number in range(1, len(STAGES) + 1):
            features = self.get_submodule(f"layer{number}")(features)
        output: Tensor = self.fc(self.avgpool(features).flatten(1))
        return output


def _resnet(name: str, image_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
    channels = check_spatial(name, image_shape)[0]
    with isolated_randomness(generator):
        net = ResNet18(channels, classes, small_images=name == "resnet18_cifar")
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return net


@MODELS.register(
    "resnet18",
    summary="ResNet18 with the ImageNet stem (7x7 stride 2, max pooling); He initialization, dense layer as PyTorch",
    paper="He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016",
    limits="two spatial dimensions; meant for 224x224, images of 32x32 end in a single position",
)
def resnet18(image_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
    """ResNet18 with the ImageNet stem; torchvision's `resnet18` weights fit."""
    return _resnet("resnet18", image_shape, classes, generator)


@MODELS.register(
    "resnet18_cifar",
    summary="ResNet18 with a 3x3 stride-1 stem and no max pooling, for small images; initialized as resnet18",
    paper="He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016",
    limits="two spatial dimensions",
)
def resnet18_cifar(image_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
    """ResNet18 for 32x32 images."""
    return _resnet("resnet18_cifar", image_shape, classes, generator)

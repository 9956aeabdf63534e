"""Networks of medical imaging from MONAI, which is an optional extra: `pip install 'medpfl[monai]'`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from medpfl.core.errors import MissingExtra
from medpfl.models.randomness import isolated_randomness
from medpfl.models.registry import MODELS, SEGMENTATION
from medpfl.models.shapes import check_divisible, check_spatial

SMALLEST = 32
"""Five halvings leave nothing of smaller images."""

UNET_CHANNELS = (16, 32, 64)
UNET_HALVINGS = 2


def monai_networks(name: str) -> Any:
    """The module `monai.networks.nets`; raises `MissingExtra` that names the model where MONAI is not installed."""
    try:
        return importlib.import_module("monai.networks.nets")
    except ImportError as error:
        raise MissingExtra(
            f"model '{name}' comes from MONAI, which is not installed: run pip install 'medpfl[monai]', "
            "or choose another model"
        ) from error


@MODELS.register(
    "densenet121",
    summary="DenseNet121 of MONAI: 121 layers with batch norm and ReLU, initialized as MONAI does; needs medpfl[monai]",
    paper="Huang et al.: Densely Connected Convolutional Networks, CVPR 2017; chest X-rays: Rajpurkar et al.: CheXNet, "
    "2017",
    limits="two or three spatial dimensions of at least 32 pixels; batch norm in train mode needs more than one image "
    "below 64 pixels",
)
def densenet121(image_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
    """DenseNet121 for images and volumes."""
    networks = monai_networks("densenet121")
    shape = check_spatial("densenet121", image_shape, (2, 3), smallest=SMALLEST)
    with isolated_randomness(generator):
        net: nn.Module = networks.DenseNet121(
            spatial_dims=len(shape) - 1, in_channels=shape[0], out_channels=classes, dropout_prob=0.0
        )
    return net


@MODELS.register(
    "efficientnet_b0",
    summary="EfficientNet-B0 of MONAI: inverted bottlenecks, squeeze and excitation, swish; needs medpfl[monai]",
    paper="Tan, Le: EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019",
    limits="two or three spatial dimensions of at least 32 pixels; dropout and dropped blocks are off in audits; batch "
    "norm in train mode needs more than one image below 64 pixels",
)
def efficientnet_b0(image_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
    """EfficientNet-B0 for images and volumes, with the swish that has second derivatives."""
    networks = monai_networks("efficientnet_b0")
    shape = check_spatial("efficientnet_b0", image_shape, (2, 3), smallest=SMALLEST)
    with isolated_randomness(generator):
        net: nn.Module = networks.EfficientNetBN(
            "efficientnet-b0", pretrained=False, spatial_dims=len(shape) - 1, in_channels=shape[0], num_classes=classes
        )
    net.set_swish(memory_efficient=False)  # type: ignore[operator]
    return net


@MODELS.register(
    "unet",
    summary="residual U-Net of MONAI for segmentation: 16, 32 and 64 channels, instance norm, PReLU; needs medpfl[monai]",
    paper="Kerfoot et al.: Left-Ventricle Quantification Using Residual U-Net, STACOM 2018; Ronneberger, Fischer, Brox: "
    "U-Net, MICCAI 2015",
    limits="data with masks; two or three spatial dimensions of at least 8 pixels, each divisible by 4",
)
def unet(image_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
    """U-Net for images and volumes with MONAI's own defaults and two residual units per level."""
    networks = monai_networks("unet")
    shape = check_spatial("unet", image_shape, (2, 3), smallest=8)
    check_divisible("unet", shape, 2**UNET_HALVINGS)
    with isolated_randomness(generator):
        net: nn.Module = networks.UNet(
            spatial_dims=len(shape) - 1,
            in_channels=shape[0],
            out_channels=classes,
            channels=UNET_CHANNELS,
            strides=(2,) * UNET_HALVINGS,
            num_res_units=2,
            dropout=None,
        )
    return net


SEGMENTATION.add("unet")

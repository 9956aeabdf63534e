"""ImageNet weights from the user's torchvision, never downloaded from here."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from medpfl.core.domain import GlobalModel
from medpfl.core.errors import ModelError
from medpfl.models.state import apply_state, read_tensors

CHANNEL_MEAN = (0.485, 0.456, 0.406)
CHANNEL_STD = (0.229, 0.224, 0.225)
"""Normalization that torchvision's ImageNet weights were trained with."""

AVAILABLE = {"resnet18": "ResNet18_Weights"}
"""Models of the zoo with the name of torchvision's enumeration of their weights."""


def imagenet_weights(model: GlobalModel) -> tuple[GlobalModel, tuple[str, ...]]:
    """The model with ImageNet weights, and sentences that say what was changed to make them fit.

    Only `resnet18` has some. The file must already lie in the cache of the user's torchvision. A head with other than
    1000 classes keeps the model's own initialization; a one-channel stem takes the sum over the three color kernels,
    which is what the color stem computes for a grey image. Raises `ModelError` where this is not possible.
    """
    if model.name not in AVAILABLE:
        known = ", ".join(sorted(AVAILABLE))
        raise ModelError(
            f"state: imagenet is not available for model '{model.name}': use {known}, "
            "or give a checkpoint path as state"
        )
    path = _cached_file(AVAILABLE[model.name])
    tensors = read_tensors(path)
    prefix = "body." if any(name.startswith("body.") for name in model.parameters) else ""
    own = {name.removeprefix(prefix): tensor for name, tensor in model.parameters.items()}
    notes: list[str] = []
    if own["fc.weight"].shape != tensors["fc.weight"].shape:
        tensors["fc.weight"], tensors["fc.bias"] = own["fc.weight"], own["fc.bias"]
        notes.append(
            f"the head for {model.task.classes} classes keeps its random initialization, ImageNet has 1000 classes"
        )
    if own["conv1.weight"].shape[1] == 1:
        tensors["conv1.weight"] = tensors["conv1.weight"].sum(dim=1, keepdim=True)
        notes.append("the stem for one channel is the sum of ImageNet's kernels for red, green and blue")
    if not prefix:
        notes.append(
            "ImageNet weights expect normalized images: set normalize to mean "
            f"{list(CHANNEL_MEAN)} and std {list(CHANNEL_STD)} (their averages for grey images)"
        )
    return apply_state(model, tensors, f"ImageNet weights '{path.name}'"), tuple(notes)


def _cached_file(enumeration: str) -> Path:
    try:
        models = importlib.import_module("torchvision.models")
        url = str(getattr(models, enumeration).IMAGENET1K_V1.url)
    except (ImportError, RuntimeError, AttributeError) as error:
        raise ModelError(
            "state: imagenet needs torchvision, which is not installed or does not fit this PyTorch: "
            "install torchvision, or give a checkpoint path as state"
        ) from error
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        raise ModelError(
            f"state: imagenet finds no '{path.name}' in torchvision's cache ({path.parent}): download it there once, "
            "for instance by torchvision.models.resnet18(weights='IMAGENET1K_V1'), or give a checkpoint path as state"
        )
    return path

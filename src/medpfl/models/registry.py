"""The names of the zoo."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from medpfl.core.registry import Registry


class ModelFactory(Protocol):
    """Makes an initialized model; the same generator state gives the same model, the global one is left alone."""

    def __call__(self, image_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
        """image_shape: (C, *spatial). The model maps (N, *image_shape) to (N, classes), or (N, classes, *spatial)."""


MODELS: Registry[ModelFactory] = Registry("model")

SEGMENTATION: set[str] = set()
"""Names of the models that give a class per pixel; the others give one per image."""

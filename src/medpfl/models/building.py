"""Models by name."""

from __future__ import annotations

import torch

from medpfl.core.domain import GlobalModel
from medpfl.core.tasks import Task
from medpfl.models.normalization import Normalization
from medpfl.models.preparation import prepare
from medpfl.models.registry import MODELS


def build_model(
    name: str,
    *,
    image_shape: tuple[int, ...],
    task: Task,
    normalize: Normalization | None = None,
    generator: torch.Generator,
) -> GlobalModel:
    """An initialized model of the zoo."""
    module = MODELS[name].item(image_shape, task.classes, generator)
    return prepare(module, name=name, image_shape=image_shape, task=task, normalize=normalize)

"""The client's own build of the model that tensors are said to belong to, its shapes taken from the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from medpfl.core.domain import GlobalModel, Tensors
from medpfl.core.errors import ModelError
from medpfl.core.tasks import MultiLabel, Segmentation, SingleLabel, Task
from medpfl.guards.vetting.layers import Layers, layers_of
from medpfl.models import SEGMENTATION, build_model
from medpfl.models.state import apply_state

SIDES = (32, 28, 64, 96, 128, 224, 256)
"""Sides of images that are tried where none is given."""

TaskName = Literal["single_label", "multi_label", "segmentation"]
TASKS: dict[TaskName, type[SingleLabel] | type[MultiLabel] | type[Segmentation]] = {
    "single_label": SingleLabel,
    "multi_label": MultiLabel,
    "segmentation": Segmentation,
}


def build_agreed(
    name: str,
    tensors: Tensors,
    *,
    size: int | None = None,
    channels: int | None = None,
    classes: int | None = None,
    task: TaskName | None = None,
    search_path: Sequence[Path] = (),
) -> GlobalModel:
    """A model of the zoo or of a factory, for images and classes as the tensors show them.

    size: pixels along every axis; by default the first of `SIDES` for which the tensors fit, else the first for which
    the model can be built. channels: by default those of the first convolution. classes: by default the rows of the
    last layer. task: by default segmentation for the zoo's segmentation models, else one class per image.

    Raises `ModelError` where a number is not given and cannot be read off the tensors, or no model can be built.
    """
    layers = layers_of(tensors)
    depth = channels if channels is not None else _channels(name, layers)
    kind = TASKS[task or ("segmentation" if name in SEGMENTATION else "single_label")]
    goal = kind(classes if classes is not None else _classes(name, layers))
    axes = layers.convolutions[0].weight.ndim - 2 if layers.convolutions else 2
    built: list[GlobalModel] = []
    errors: list[ModelError] = []
    for side in SIDES if size is None else (size,):
        try:
            model = _built(name, (depth, *(side,) * axes), goal, search_path)
        except ModelError as error:
            errors.append(error)
            continue
        if _fits(model, tensors):
            return model
        built.append(model)
    if not built:
        raise errors[0]
    return built[0]


def _built(name: str, image_shape: tuple[int, ...], task: Task, search_path: Sequence[Path]) -> GlobalModel:
    generator = torch.Generator().manual_seed(0)
    return build_model(name, image_shape=image_shape, task=task, generator=generator, search_path=search_path)


def _fits(model: GlobalModel, tensors: Tensors) -> bool:
    try:
        apply_state(model, tensors, "checkpoint")
    except ModelError:
        return False
    return True


def _channels(name: str, layers: Layers) -> int:
    if not layers.convolutions:
        raise ModelError(f"how many channels images of '{name}' have cannot be read off the file: give --channels")
    return int(layers.convolutions[0].weight.shape[1])


def _classes(name: str, layers: Layers) -> int:
    if not layers.all:
        raise ModelError(f"how many classes '{name}' has cannot be read off the file: give --classes")
    return int(layers.all[-1].weight.shape[0])

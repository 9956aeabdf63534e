"""What the models of an audit are trained for, and with: labels of images, or masks."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from medpfl.audit.entries import ModelEntry
from medpfl.core.errors import SpecError
from medpfl.core.tasks import Segmentation, SingleLabel, Task
from medpfl.data import Dataset


def why_no_masks(dataset: Dataset, entry: ModelEntry) -> str | None:
    """The reason why the model has no masks to be trained with; None if it has, or needs none."""
    if not entry.segments or dataset.masks is not None:
        return None
    return (
        f"'{entry.id}' is a segmentation model and the data '{dataset.name}' has no masks: set mask_path where its reader "
        "has one, or use another model"
    )


def task_of(dataset: Dataset, entry: ModelEntry) -> Task:
    """The task of a model on a data set. Raises SpecError where they do not fit."""
    if (reason := why_no_masks(dataset, entry)) is not None:
        raise SpecError(f"models '{entry.id}': {reason}")
    task = Segmentation(len(dataset.mask_names)) if entry.segments else dataset.task
    if entry.classes is None or entry.classes == task.classes:
        return task
    if entry.classes < task.classes or not isinstance(task, SingleLabel):
        raise SpecError(
            f"models '{entry.id}': classes is {entry.classes}, but '{dataset.name}' has {task.classes} classes; "
            "leave `classes` out or make it larger"
        )
    return replace(task, classes=entry.classes)


def targets_of(dataset: Dataset, entry: ModelEntry) -> Tensor:
    """What the model is trained with, for all images: masks int64 (N, *spatial), or labels."""
    return dataset.masks if entry.segments and dataset.masks is not None else dataset.targets

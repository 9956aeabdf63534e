"""A model at work on a few images: what its layers get and answer, and what one simulated client step gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.core.domain import Batch, GlobalModel
from medpfl.core.tasks import Segmentation, SingleLabel
from medpfl.guards.layer_views import LayerView, layer_views
from medpfl.guards.self_test import SelfTest, self_test

MOST_IMAGES = 16
"""Images that a model is watched on; the same number for all models, since the thresholds were fixed with it."""

MOST_IMAGES_OF_LARGE = 8
LARGE = 30_000_000
"""Models with more entries are watched on fewer images, so that vetting stays a matter of seconds."""

POSITIONS = 64
"""Positions of a layer that is applied to many, at which its input is compared between images."""


@dataclass(frozen=True)
class Watched:
    """One simulated client step on `batch` in eval mode, layer by layer.

    views: dense layers and convolutions with trained weights. not_seen: other trained weights, and why they were not
    looked at. test: what the step's gradient of the dense layers gives back.
    """

    model: GlobalModel
    batch: Batch
    views: tuple[LayerView, ...]
    not_seen: Mapping[str, str]
    test: SelfTest

    @property
    def per_image(self) -> tuple[LayerView, ...]:
        """The layers that get one vector per image."""
        return tuple(view for view in self.views if view.count == view.images)

    def answers(self, view: LayerView) -> Tensor:
        """What the layer's units answer before any activation, (S, units) in float64."""
        weight = self.model.parameters[view.weight].double().flatten(1)
        found = view.samples().double() @ weight.T
        return found if view.bias is None else found + self.model.parameters[view.bias].double()


def watch(model: GlobalModel, images: Tensor) -> Watched:
    """Runs one simulated client step on the first of the images (N, *model.image_shape), labels taking turns.

    Raises `ModelError` if the model cannot run on them.
    """
    most = MOST_IMAGES_OF_LARGE if model.parameter_count > LARGE else MOST_IMAGES
    chosen = images[:most].to(model.device, torch.float32)
    batch = Batch(chosen, labels_for(model, len(chosen)).to(model.device))
    single = model.to(torch.float32)
    views, not_seen = layer_views(single, batch)
    gradient = {view.weight: view.errors @ view.samples() for view in views if not view.convolution}
    return Watched(single, batch, tuple(views), not_seen, self_test(single, gradient, batch))


def labels_for(model: GlobalModel, count: int) -> Tensor:
    """Targets of the model's task that take turns, so that every class has its images and no model fits them all."""
    turns = torch.arange(count) % model.task.classes
    if isinstance(model.task, SingleLabel):
        return turns
    if isinstance(model.task, Segmentation):
        rows = torch.arange(torch.Size(model.image_shape[1:]).numel()).reshape(model.image_shape[1:])
        return torch.stack([(rows + turn) % model.task.classes for turn in turns])
    return torch.nn.functional.one_hot(turns, model.task.classes).float()


def variation(values: Tensor) -> float:
    """How much what a layer gets differs between images (N, ...), as a share of its size; 0 if it is always the same."""
    flat = values.flatten(1).double()
    return float((flat - flat.mean(dim=0)).norm() / flat.norm().clamp_min(1e-300))


def input_variation(view: LayerView) -> float:
    """`variation` of what the layer got, at some of its positions."""
    received, places = view.calls[0]
    flat = received.flatten(1, places - 1) if places > 1 else received
    if places > 1:
        step = max(1, flat.shape[1] // POSITIONS)
        flat = flat[:, ::step]
    return variation(flat)

"""A model at work on a few images: what its layers get and answer, and what one simulated client step gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medpfl.core.domain import Batch, GlobalModel
from medpfl.core.errors import ModelError
from medpfl.core.functional import is_finite
from medpfl.core.tasks import Segmentation, SingleLabel
from medpfl.guards.frozen import frozen_views
from medpfl.guards.layer_views import LayerView, layer_views, sample_view
from medpfl.guards.self_test import SelfTest, read_views
from medpfl.guards.vetting.layers import FEWEST

MOST_IMAGES = 16
"""Images that a model is watched on."""

MOST_IMAGES_OF_LARGE = 8
LARGE = 30_000_000
LARGE_IMAGE = 128 * 128
"""Models with more entries, or for more pixels, are watched on fewer images: vetting stays a matter of seconds."""

FEWEST_INPUTS = 64
"""Layers that get fewer numbers have no whole image to give away, and their rows, once pruned, are alike by chance."""

FEWEST_IMAGES = 4
"""With fewer images units are alike by chance."""

POSITIONS = 4
"""Positions along each axis at which the input of a layer that is applied to many is compared between images."""


@dataclass(frozen=True)
class Watched:
    """One simulated client step on `batch` in eval mode, layer by layer.

    views: dense layers and convolutions with trained weights. not_seen: other trained weights, and why they were not
    looked at. test: what the step's gradient of the dense layers gives back. head: the last layer with a unit per class;
    labels tell images apart in its gradient, honest or not. frozen: layers with weights that no client trains. grainy:
    what hidden layers that get one vector per image get for the same images with grain over them, (N, inputs) by path.
    """

    model: GlobalModel
    batch: Batch
    views: tuple[LayerView, ...]
    not_seen: Mapping[str, str]
    test: SelfTest
    head: LayerView | None
    frozen: tuple[LayerView, ...]
    grainy: Mapping[str, Tensor]

    @property
    def per_image(self) -> tuple[LayerView, ...]:
        """The layers that get one vector per image."""
        return tuple(view for view in self.views if view.count == view.images)

    @property
    def wide(self) -> tuple[LayerView, ...]:
        """Layers but the head, trained or frozen, that get one vector per image and have enough units, inputs and
        images to say something."""
        return tuple(
            view
            for view in (*self.views, *self.frozen)
            if view.count == view.images >= FEWEST_IMAGES
            and view.units >= FEWEST
            and view.inputs >= FEWEST_INPUTS
            and not self.gives_classes(view)
        )

    def gives_classes(self, view: LayerView) -> bool:
        """Whether it is the head, or a frozen layer in its place."""
        return view is self.head or (view.units == self.model.task.classes and any(view is one for one in self.frozen))

    def rows(self, view: LayerView) -> Tensor:
        """The layer's weights, (units, inputs)."""
        return {**self.model.constants, **self.model.parameters}[view.weight].flatten(1)

    def answers(self, view: LayerView) -> Tensor:
        """What the layer's units answer before any activation, (S, units)."""
        found = view.samples() @ self.rows(view).T
        return found if view.bias is None else found + {**self.model.constants, **self.model.parameters}[view.bias]


def watch(model: GlobalModel, images: Tensor) -> Watched:
    """Runs one simulated client step on the first of the images (N, *model.image_shape), labels taking turns.

    Raises `ModelError` if the model gives numbers that are not finite.
    """
    large = model.parameter_count > LARGE or torch.Size(model.image_shape[1:]).numel() > LARGE_IMAGE
    most = MOST_IMAGES_OF_LARGE if large else MOST_IMAGES
    chosen = images[:most].to(model.device, torch.float32)
    batch = Batch(chosen, labels_for(model, len(chosen)).to(model.device))
    single = model.to(torch.float32)
    views, not_seen = layer_views(single, batch)
    if not all(is_finite(view.errors) for view in views):
        raise ModelError(f"model '{model.name}' gives numbers that are not finite for images: do not train on it")
    head = next((view for view in reversed(views) if view.units == model.task.classes), None)
    frozen = frozen_views(single, batch)
    hidden = [view.path for view in (*views, *frozen) if view.count == view.images and view is not head]
    gradient = {view.weight: view.errors @ view.samples() for view in views if not view.convolution}
    test = read_views(single, (views, not_seen), gradient, frozen=frozen)
    grainy = received_for(single, hidden, with_grain(chosen))
    return Watched(single, batch, tuple(views), not_seen, test, head, frozen, grainy)


GRAIN = 0.5
"""Share of its brightness that a pixel loses to grain at most."""


def with_grain(images: Tensor) -> Tensor:
    """The images, every pixel darkened by a random share of its own, the same for all channels; what is 0 stays 0.

    An honest unit answers to grain by all of its weights, a bin only by the change in brightness.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (len(images), 1, *images.shape[2:])
    return images * (1.0 - GRAIN * torch.rand(shape, generator=generator).to(images.device))


def received_for(model: GlobalModel, paths: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """What these layers get for the images, (N, inputs) by path; the model is not run where there are none."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            view, _ = sample_view(layer, arguments[0].detach())
            found[path] = view.reshape(len(images), -1).clone()

        return hook

    handles = [model.module.get_submodule(path).register_forward_pre_hook(keep(path)) for path in paths]
    try:
        with torch.no_grad():
            if paths:
                model.forward(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


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
    steps = [slice(None, None, max(1, size // POSITIONS)) for size in received.shape[1:places]]
    return variation(received[(slice(None), *steps)])

"""Mixtures of the images of a batch, for Mixup and InstaHide."""

from __future__ import annotations

import torch
from torch import Tensor

from medpfl.core.domain import Batch, GlobalModel, Recipe

MOST_TRIES = 1000
"""Draws of weights after which the last ones are cut off instead."""


def mixed(batch: Batch, model: GlobalModel, images: int, largest: float, generator: torch.Generator) -> Batch:
    """Each image mixed with `images` - 1 others of its batch, its label too: float (N, classes).

    Weights are from Dirichlet(3, 1, ..., 1), drawn again until none is above `largest`. Partners come from random orders
    of the batch, so an image may meet itself.
    """
    count = len(batch)
    weights = mixing_weights(count, images, largest, generator).to(batch.images)
    orders = [torch.arange(count), *(torch.randperm(count, generator=generator) for _ in range(images - 1))]
    labels = model.task.encode(batch.targets).to(batch.images)
    pictures, targets = torch.zeros_like(batch.images), torch.zeros_like(labels)
    for place, order in enumerate(orders):
        chosen = order.to(batch.images.device)
        pictures = pictures + _spread(weights[:, place], pictures) * batch.images[chosen]
        targets = targets + _spread(weights[:, place], targets) * labels[chosen]
    return Batch(pictures.clamp(0.0, 1.0), targets)


def mixing_weights(count: int, images: int, largest: float, generator: torch.Generator) -> Tensor:
    """(count, images) float64, rows sum to 1, no entry above `largest`.

    >>> weights = mixing_weights(100, 4, 0.65, torch.Generator().manual_seed(0))
    >>> bool((weights.sum(dim=1) - 1).abs().max() < 1e-12), bool(weights.max() <= 0.65)
    (True, True)
    """
    shape = torch.tensor([3.0, *([1.0] * (images - 1))], dtype=torch.float64).expand(count, images)
    weights = torch.full((count, images), 1.0 / images, dtype=torch.float64)
    missing = torch.ones(count, dtype=torch.bool)
    for _ in range(MOST_TRIES):
        drawn = torch._standard_gamma(shape.contiguous(), generator=generator)
        drawn = drawn / drawn.sum(dim=1, keepdim=True)
        good = missing & (drawn.max(dim=1).values <= largest)
        weights[good] = drawn[good]
        missing &= ~good
        if not bool(missing.any()):
            break
    return weights


def why_no_mixing(name: str, recipe: Recipe, images: int, largest: float) -> list[str]:
    """Reasons why the images of such a client cannot be mixed."""
    if recipe.batch_size < 2:
        return [
            f"{name} mixes the images of a batch, and a mixture of one image is that image; use batch_size: 2 or more"
        ]
    if largest * images < 1.0:
        return [f"{name}: weights of {images} images that sum to 1 cannot all be at most {largest:g}; raise largest"]
    return []


def _spread(weights: Tensor, like: Tensor) -> Tensor:
    return weights.reshape(-1, *(1 for _ in like.shape[1:]))

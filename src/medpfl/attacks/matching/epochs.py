"""Clients whose image order nobody sees: images of their own for every epoch, tied together (Dimitrov et al. 2022).

Simulated clients take the variables either in one assumed order in all epochs (one copy), or separate variables in
every epoch (as many copies as epochs). Copies are tied by a prior that does not depend on the order within an epoch;
after the search the images of every epoch are paired with those of the first, and averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from medpfl.attacks.matching.priors import Prior, no_prior
from medpfl.core.functional import assignment

Pooling = Literal["mean", "max"]
Features = Literal["pixels", "convolution"]

FILTERS = 96
"""Random 3 x ... x 3 filters of `convolution` features."""

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def epoch_orders(examples: int, epochs: int, copies: int) -> tuple[Tensor, ...]:
    """The variables that each epoch takes: the same ones in order, or with as many copies as epochs those of its own.

    >>> [order.tolist() for order in epoch_orders(2, epochs=2, copies=2)]
    [[0, 1], [2, 3]]
    """
    return tuple(torch.arange(examples) + (epoch if copies > 1 else 0) * examples for epoch in range(epochs))


def spread(labels: Tensor) -> Tensor:
    """Ascending class labels (K,) rearranged so that every stretch holds about as many of a class as any other.

    It is what an attacker who knows how often each class occurs expects of the batches of local steps.

    >>> spread(torch.tensor([0, 0, 0, 0, 1, 1])).tolist()
    [0, 1, 0, 0, 1, 0]
    """
    counts = torch.bincount(labels)[labels]
    first = torch.searchsorted(labels, labels)
    position = (torch.arange(len(labels)) - first + 0.5) / counts
    return labels[position.argsort(stable=True)]


def merged(images: Tensor, labels: Tensor | None, copies: int) -> Tensor:
    """Images (copies * K, C, *spatial) -> (K, C, *spatial): each copy paired with the first one, then the mean.

    Pairs have the least summed squared distance; where `labels` (copies * K,) are class indices, images of one label
    stay among themselves.
    """
    if copies == 1:
        return images
    count = len(images) // copies
    epochs = images.reshape(copies, count, *images.shape[1:])
    flat = epochs.flatten(2).double()
    apart = torch.zeros(copies, count, count, dtype=torch.float64)
    if labels is not None and labels.ndim == 1:
        kinds = labels.reshape(copies, count)
        apart = (kinds[:1, :, None] != kinds[:, None, :]).double()
    total = epochs[0].clone()
    for epoch in range(1, copies):
        distances = torch.cdist(flat[0], flat[epoch]).square()
        _, partners = assignment(distances + apart[epoch] * (1.0 + distances.sum()))
        total = total + epochs[epoch][partners]
    return total / copies


def same_images(weight: float, copies: int, pooling: Pooling, features: Features) -> Prior:
    """`weight` times the mean square, over all pairs of epochs, of the difference of what is pooled over their images.

    Dimitrov et al. 2022: pixels, or random convolution features, are pooled over an epoch's images by mean or maximum,
    which no order changes.
    """
    if not weight or copies == 1:
        return no_prior
    extract = _extractor(features)

    def penalty(images: Tensor) -> Tensor:
        found = extract(images)
        epochs = found.reshape(copies, -1, *found.shape[1:])
        pooled = epochs.mean(dim=1) if pooling == "mean" else epochs.amax(dim=1)
        return weight * (pooled[:, None] - pooled[None]).square().mean()

    return penalty


def _extractor(features: Features) -> Callable[[Tensor], Tensor]:
    if features == "pixels":
        return lambda images: images

    def convolved(images: Tensor) -> Tensor:
        spatial = images.ndim - 2
        shape = (FILTERS, images.shape[1], *(3 for _ in range(spatial)))
        filters = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        filters = (filters / filters[0].numel() ** 0.5).to(images)
        return CONVOLUTIONS[spatial](images, filters, padding=1)

    return convolved

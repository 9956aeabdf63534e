"""Updates on which a filter is tried: of a small model with batch norm, trained one step on drawn images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor, nn

from medpfl.core.domain import Batch, Recipe, Tensors
from medpfl.core.seeding import generator
from medpfl.data import Dataset, load_dataset
from medpfl.data.readers.phantom import PhantomReader
from medpfl.federation.client import client_step
from medpfl.models import prepare
from medpfl.models.randomness import isolated_randomness

BATCHES_SEEN = 1840
"""The batch-norm counter of the update: so many batches were trained on before."""


@dataclass(frozen=True)
class Sample:
    """An update as a platform hands it to a filter: all tensors in one mapping, and which of them are what."""

    trainable: Tensors
    buffers: Tensors = field(default_factory=dict)
    counters: Tensors = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of them, in order."""
        return {**self.trainable, **self.buffers, **self.counters}

    @property
    def floating(self) -> dict[str, Tensor]:
        """Trainable tensors and buffers."""
        return {**self.trainable, **self.buffers}

    def scaled(self, factor: float) -> Sample:
        """With every trainable entry and buffer times a factor."""
        return self.mapped(lambda tensor: tensor * factor)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Sample:
        """With every trainable tensor and buffer changed by a function of the tensor."""
        return replace(
            self,
            trainable={name: change(tensor) for name, tensor in self.trainable.items()},
            buffers={name: change(tensor) for name, tensor in self.buffers.items()},
        )

    def counting(self, batches: int) -> Sample:
        """With another number of batches in the counters."""
        return replace(
            self, counters={name: torch.full_like(tensor, batches) for name, tensor in self.counters.items()}
        )


def drawn_images(count: int, *, seed: int = 0, size: int = 32) -> Dataset:
    """Images that look like brain MRI, drawn, so that an audit of a filter needs no data."""
    return load_dataset(PhantomReader(count=count, seed=seed), name="phantom", size=size, channels=1)


@cache
def sample_update() -> Sample:
    """The change of all tensors in one local step on eight images, with batch norm's new statistics and counters."""
    data, draws = drawn_images(8), generator("filter sample")
    with isolated_randomness(draws):
        module = nn.Sequential(
            nn.Conv2d(1, 12, 5, stride=2),
            nn.BatchNorm2d(12),
            nn.Tanh(),
            nn.Conv2d(12, 24, 5, stride=2),
            nn.BatchNorm2d(24),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(24 * 25, 32),
            nn.Tanh(),
            nn.Linear(32, len(data.class_names)),
        )
    model = prepare(module, name="filter sample", image_shape=(1, 32, 32), task=data.task)
    recipe = Recipe(update="delta", batch_size=8, batch_norm="train", learning_rate=0.01)
    update, _ = client_step(model, Batch(data.images, data.targets), recipe, generator=draws)
    counters = {name: torch.full_like(tensor, BATCHES_SEEN) for name, tensor in update.counters.items()}
    return Sample(dict(update.trainable), dict(update.buffers), counters)

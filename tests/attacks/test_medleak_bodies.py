"""MedLeak's module in front of every kind of model of the zoo: gray and color, images and volumes, labels and masks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attacked_rounds import alone_in_bins, attacked_round
from torch import Tensor

from medpfl.attacks.medleak import MedLeak
from medpfl.core.domain import Auxiliary, Batch, Recipe
from medpfl.core.tasks import Segmentation, SingleLabel, Task
from medpfl.models import SEGMENTATION, build_model

SIZE = 8
MONAI = ("densenet121", "unet")
LARGE = ("densenet121", "resnet18", "resnet18_cifar", "vit")
"""Without calibration, whose thirty steps take long."""

BODIES: list[tuple[str, tuple[int, ...]]] = [
    ("lenet_dlg", (1, 28, 28)),
    ("lenet_idlg", (3, 28, 28)),
    ("resnet18_cifar", (3, 28, 28)),
    ("resnet18", (1, 64, 64)),
    ("densenet121", (1, 64, 64)),
    ("vit", (3, 32, 32)),
    ("unet_small", (1, 32, 32)),
    ("unet", (3, 32, 32)),
    ("cnn3", (1, 12, 16, 14)),
    ("unet_small", (1, 8, 12, 12)),
]


@pytest.mark.parametrize(
    ("name", "shape"), BODIES, ids=lambda part: part if isinstance(part, str) else "x".join(map(str, part))
)
def test_every_body_lets_the_gradient_through(name: str, shape: tuple[int, ...], blobs: Callable[..., Tensor]) -> None:
    """Clients train as they do: batch norm in train mode where the model has any."""
    if name in MONAI and importlib.util.find_spec("monai") is None:
        pytest.skip("needs the extra medpfl[monai]")
    generator, task = torch.Generator().manual_seed(0), _task(name)
    model = build_model(name, image_shape=shape, task=task, generator=generator)
    images = blobs(100, shape)
    labels: Any = torch.arange(100) % 3
    if isinstance(task, Segmentation):
        labels = (images[:, 0] > 0.5).long()
    recipe = Recipe(update="weights", batch_size=SIZE, learning_rate=0.05, batch_norm="train")
    attack = MedLeak(bins=128, queries=1, scale=1e-4 if name in LARGE else "auto")
    assert attack.why_not(model, recipe, "weights", SIZE) is None
    found = attacked_round(
        attack, model, [Batch(images[:SIZE], labels[:SIZE])], Auxiliary(images[SIZE:], labels[SIZE:]), recipe
    )
    alone = int(alone_in_bins(images[:SIZE], found.broadcast.secret["edges"][0]).sum())
    assert alone >= 4
    assert found.recovered(0) >= alone


def _task(name: str) -> Task:
    return Segmentation(2) if name in SEGMENTATION else SingleLabel(3)

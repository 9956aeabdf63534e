"""What is put in front of a model works in front of any: dense nets, volumes, batch norm in train mode, segmentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attacked_rounds import attacked_round
from torch import Tensor, nn

from medpfl.attacks.crafted import CraftedAttack
from medpfl.attacks.curious_abandon_honesty import CuriousAbandonHonesty
from medpfl.attacks.robbing_the_fed import RobbingTheFed
from medpfl.core.domain import Auxiliary, Batch, Recipe
from medpfl.core.tasks import MultiLabel, Segmentation, SingleLabel, Task
from medpfl.models import prepare

MODELS: list[Any] = [
    pytest.param(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 10, 3)), (3, 12, 10), SingleLabel(3), id="dense, color"
    ),
    pytest.param(nn.Sequential(nn.Flatten(), nn.Linear(144, 4)), (1, 12, 12), MultiLabel(4), id="several labels"),
    pytest.param(
        nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 4 * 3, 3)),
        (1, 7, 6, 5),
        SingleLabel(3),
        id="volume",
    ),
    pytest.param(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3)),
        (1, 12, 12),
        SingleLabel(3),
        id="batch norm in train mode",
    ),
    pytest.param(nn.Conv2d(1, 2, 3, padding=1), (1, 12, 12), Segmentation(2), id="segmentation"),
]


def drawn_targets(task: Task, count: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if isinstance(task, Segmentation):
        return torch.randint(task.classes, (count, *shape[1:]), generator=generator)
    if isinstance(task, MultiLabel):
        return torch.randint(2, (count, task.classes), generator=generator).float()
    return torch.randint(task.classes, (count,), generator=generator)


@pytest.mark.parametrize(
    "attack",
    [
        RobbingTheFed(bins=128),
        RobbingTheFed(bins=128, variant="sparse", query="random"),
        CuriousAbandonHonesty(units=128),
    ],
    ids=["cumulative", "sparse", "traps"],
)
@pytest.mark.parametrize(("module", "shape", "task"), MODELS)
def test_most_images_come_back_in_front_of_any_model(
    attack: CraftedAttack, module: nn.Module, shape: tuple[int, ...], task: Task, blobs: Callable[..., Tensor]
) -> None:
    model = prepare(module, name="own", image_shape=shape, task=task)
    recipe = Recipe(update="delta", batch_size=8, learning_rate=0.1, batch_norm="train")
    assert attack.why_not(model, recipe, "delta", 8) is None
    images, targets = blobs(200, shape), drawn_targets(task, 200, shape)
    clients = [Batch(images[:8], targets[:8])]
    found = attacked_round(attack, model, clients, Auxiliary(images[8:], targets[8:]), recipe)
    assert found.result.images.shape[1:] == shape
    assert found.recovered(0) >= 4

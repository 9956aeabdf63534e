"""With every image MedLeak reads its label, and of an update no more than the rows that show something."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from crafted_rounds import Round, attacked
from torch import Tensor

from medpfl.attacks.bin_readout import read_rows
from medpfl.attacks.medleak import MedLeak
from medpfl.attacks.narrowing import narrowed
from medpfl.attacks.updates import gradient_view
from medpfl.core.domain import Recipe
from medpfl.core.tasks import Segmentation
from medpfl.data.dataset import Dataset
from medpfl.federation import Channel, Plain, SecAggPlus, SecureSum
from medpfl.metrics.scoring import pairwise_mse
from medpfl.models import build_model


def compared(found: Round, data: Dataset) -> tuple[Tensor, Tensor]:
    """Labels as read and true ones, of all candidates that are a private image."""
    assert found.result.labels is not None
    errors, rows = pairwise_mse(data.images.double(), found.result.images.double()).min(dim=0)
    return found.result.labels[errors < 1e-3], data.targets[rows[errors < 1e-3]]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(
    ("mode", "channel"), [("separate", Plain()), ("separate", SecAggPlus(clients=3)), ("joint", SecureSum(clients=3))]
)
def test_every_recovered_image_has_its_label(mode: Any, channel: Channel, queries: int, films: Dataset) -> None:
    size = 16 if mode == "joint" else 48
    read, true = compared(attacked(MedLeak(bins=192, mode=mode, queries=queries), films, size, channel=channel), films)
    assert len(true) >= 30
    assert set(true.tolist()) == {0, 1, 2}
    assert bool((read == true).all())


def test_masks_are_no_labels(films: Dataset) -> None:
    masked = replace(films, targets=(films.images[:, 0] > 0.5).long())
    model = build_model(
        "unet_small", image_shape=(1, 28, 28), task=Segmentation(2), generator=torch.Generator().manual_seed(0)
    )
    found = attacked(MedLeak(bins=64, scale=1e-4, queries=1), masked, 4, model=model)
    assert len(found.result.images)
    assert found.result.labels is None


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(update="gradient"),
        Recipe(update="delta", learning_rate=0.05, weight_decay=0.01),
        Recipe(update="weights", learning_rate=0.01, optimizer="adam"),
        Recipe(update="weights", learning_rate=0.1, momentum=0.9, local_steps=2),
    ],
    ids=["gradient", "weight decay", "adam", "momentum"],
)
def test_a_narrowed_update_shows_the_same_gradient(recipe: Recipe, films: Dataset) -> None:
    attack, names = MedLeak(bins=32, scale=1e-3, queries=1), ("front.first.weight", "front.first.bias")
    found = attacked(attack, films, 4, recipe=recipe, channel=SecureSum(clients=2)).observation
    rows = torch.tensor([5, 0, 31])
    whole = gradient_view(found, names, alone=True).tensors
    part = gradient_view(narrowed(found, {names[0]: rows, names[1]: None}), alone=True).tensors
    assert list(part) == list(names)
    assert torch.equal(part[names[0]], whole[names[0]][rows])
    assert torch.equal(part[names[1]], whole[names[1]])


def test_only_rows_that_show_something_are_asked_for_and_those_that_show_most_come_first() -> None:
    asked: list[int] = []
    bias = torch.tensor([0.1, 0.0, 3.0, -2.0, 1e-7])

    def ratios(units: Tensor, found: Tensor) -> None:
        asked.extend(units.tolist())
        found.fill_(0.5)

    edges = torch.zeros(5), torch.ones(5)
    found = read_rows(ratios, bias, *edges, (1, 512, 512), 2, floor=1e-6)
    assert found.bins.tolist() == asked == [2, 3]
    assert found.bins_read == 3
    assert read_rows(ratios, bias, *edges, (1, 512, 512), 9, floor=1e-6).bins.tolist() == [2, 3, 0]

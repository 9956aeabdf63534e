"""MedLeak against clients that take several local steps before they send anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from crafted_rounds import SGD, Round
from crafted_rounds import attacked as attacked_round

from medpfl.attacks.medleak import MedLeak
from medpfl.attacks.query_bins import QueryBins
from medpfl.attacks.several_steps import biases_from_weights, candidates
from medpfl.core.domain import Recipe
from medpfl.core.functional import assignment
from medpfl.data.dataset import Dataset
from medpfl.federation import SecAggPlus
from medpfl.metrics.scoring import pairwise_mse
from medpfl.models import build_model

STEPS = 4
SIZE = 16
"""Images per local step."""


def attacked(data: Dataset, recipe: Recipe, **other: Any) -> Round:
    attack = MedLeak(bins=256, **other.pop("settings", {}))
    return attacked_round(attack, data, STEPS * SIZE, recipe=replace(recipe, local_steps=STEPS), sought=1, **other)


def recovered_by_step(found: Round) -> list[int]:
    """Images above 30 dB of each local step."""
    errors = pairwise_mse(found.private.double(), found.result.images.double())
    rows, columns = assignment(errors.clamp_max(1e-3))
    good = [int(row) for row, column in zip(rows, columns, strict=True) if errors[row, column] < 1e-3]
    return [sum(row // SIZE == step for row in good) for step in range(STEPS)]


CLIENTS = {
    "sgd": SGD,
    "momentum": replace(SGD, momentum=0.9),
    "adam": replace(SGD, optimizer="adam", learning_rate=1e-3),
    "adamw": replace(SGD, optimizer="adamw", learning_rate=1e-3, weight_decay=0.01),
}


@pytest.mark.parametrize("client", list(CLIENTS))
def test_a_module_that_stops_itself_keeps_the_first_batch(client: str, films: Dataset) -> None:
    """Nearly all of the first batch (collisions within it aside), next to nothing of the others."""
    found = attacked(films, CLIENTS[client], settings={"steps": "first_batch"})
    first, *others = recovered_by_step(found)
    assert first >= 0.6 * SIZE
    assert sum(others) <= 2


@pytest.mark.parametrize("client", ["sgd", "momentum"])
def test_a_module_in_front_of_a_quiet_body_shows_images_of_all_steps(client: str, films: Dataset) -> None:
    found = attacked(films, CLIENTS[client])
    assert "all images of all local steps" in found.broadcast.notes[0]
    assert min(recovered_by_step(found)) >= SIZE / 4
    assert sum(recovered_by_step(found)) >= 0.6 * STEPS * SIZE


def test_behind_secagg_the_first_batch_is_what_comes_through(films: Dataset) -> None:
    found = attacked(films, SGD, channel=SecAggPlus(clients=2))
    assert recovered_by_step(found)[0] >= 0.6 * SIZE


def test_what_cannot_work_is_not_tried_unless_asked_for() -> None:
    assert candidates(CLIENTS["sgd"], "auto") == ("first_batch", "all_batches")
    assert candidates(CLIENTS["adam"], "auto") == ("first_batch",)
    assert candidates(CLIENTS["adam"], "all_batches") == ("all_batches",)
    assert candidates(replace(SGD, precision="float16"), "auto") == ("first_batch",)


def test_biases_that_were_rounded_are_put_where_the_weights_say() -> None:
    """Three images in three of four bins; biases known to 10% only, weights well."""
    edges = torch.tensor([[-0.05, 0.3, 0.35, 0.4, 0.9]], dtype=torch.float64)
    bins = QueryBins(torch.full((1, 4), 0.25, dtype=torch.float64), edges)
    images = torch.tensor([[0.1, 0.5, 0.3, 0.4], [0.2, 0.6, 0.3, 0.4], [0.3, 0.6, 0.9, 0.2]], dtype=torch.float64)
    means, errors = images.mean(dim=1), torch.tensor([2.0, -1.0, 3.0], dtype=torch.float64)  # 0.325, 0.375 and 0.5
    active = (means[:, None] > edges).double()
    weight, bias = active.T @ (errors[:, None] * images), active.T @ errors
    exact = biases_from_weights(weight, bias, bins)
    torch.testing.assert_close(exact, bias)
    noise = torch.tensor([0.3, -0.3, 0.1, 0.2, 0.0], dtype=torch.float64)
    steps = bins.per_bin(biases_from_weights(weight, bias + noise, bins))
    torch.testing.assert_close(steps[1], torch.tensor(2.0).double(), rtol=0.1, atol=0)
    torch.testing.assert_close(steps[2], torch.tensor(-1.0).double(), rtol=0.1, atol=0)


def test_the_published_module_is_not_changed_for_several_steps_and_loses_what_ours_keeps(films: Dataset) -> None:
    sgd = CLIENTS["sgd"]
    published = attacked(films, sgd, settings=MedLeak.presets["published"])
    assert sum(recovered_by_step(published)) < 0.4 * STEPS * SIZE
    body = published.broadcast.model(0).parameters
    agreed = build_model(
        "lenet_idlg", image_shape=(1, 28, 28), task=films.task, generator=torch.Generator().manual_seed(0)
    )
    for name, tensor in agreed.parameters.items():
        assert torch.equal(body[f"body.{name}"], tensor)

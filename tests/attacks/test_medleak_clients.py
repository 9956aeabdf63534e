"""MedLeak fits its sizes and its read-out to the clients' own arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from crafted_rounds import SGD, Round, alone_between
from crafted_rounds import attacked as attacked_round

from medpfl.attacks.calibration import FAILED, Search, Trial, sought
from medpfl.attacks.crafted import ServerView
from medpfl.attacks.medleak import MedLeak
from medpfl.core.domain import Auxiliary, Broadcast, Knowledge, Recipe
from medpfl.data.dataset import Dataset
from medpfl.federation import Plain, SecAggPlus, SecureSum

LOSS = 0.02
"""Share of the images alone in their bin that may get lost."""

ADAM: dict[str, Any] = {"optimizer": "adam", "learning_rate": 1e-3}
CLIENTS: list[Any] = [
    pytest.param(ADAM, LOSS, id="adam"),
    pytest.param({**ADAM, "optimizer": "adamw", "weight_decay": 0.01}, LOSS, id="adamw"),
    pytest.param({**ADAM, "weight_decay": 1e-4}, LOSS, id="adam with penalty"),
    pytest.param({"momentum": 0.9, "weight_decay": 1e-4}, LOSS, id="momentum"),
    pytest.param({"precision": "bfloat16"}, 0.25, id="bfloat16"),
    pytest.param({"precision": "float16"}, 0.15, id="float16"),
]


def attacked(attack: MedLeak, data: Dataset, size: int, **other: Any) -> Round:
    return attacked_round(attack, data, size, sought=1 if attack.mode == "separate" else None, **other)


def alone(found: Round) -> int:
    (edges,) = found.broadcast.secret["edges"]
    return alone_between(
        torch.cat([edges, edges.new_tensor([torch.inf])]), found.private.double().flatten(1).mean(dim=1)
    )


@pytest.mark.parametrize(("settings", "loss"), CLIENTS)
def test_sizes_and_read_out_fit_the_clients_own_arithmetic(settings: Any, loss: float, films: Dataset) -> None:
    found = attacked(MedLeak(bins=256, queries=1), films, 32, recipe=replace(SGD, **settings))
    assert found.recovered >= (1 - loss) * alone(found) > 15


@pytest.mark.parametrize("settings", [ADAM, {**ADAM, "optimizer": "adamw", "weight_decay": 0.1}], ids=["adam", "adamw"])
def test_one_adam_client_is_read_among_others_whose_dead_modules_only_decay(settings: Any, films: Dataset) -> None:
    found = attacked(
        MedLeak(bins=256, queries=1), films, 16, channel=SecureSum(clients=3), recipe=replace(SGD, **settings)
    )
    assert found.recovered >= (1 - LOSS) * alone(found) > 10


def test_adams_steps_are_bounded_so_secagg_rounds_them_away_unless_they_are_large(films: Dataset) -> None:
    """A step of SecAgg+ is 16 / 2^22 * 1000 / 32 = 1.2e-4 of a parameter, Adam moves it by the learning rate at most."""
    channel = SecAggPlus(clients=2)
    small, large = (
        attacked(
            MedLeak(bins=256, queries=1),
            films,
            32,
            channel=channel,
            recipe=replace(SGD, optimizer="adam", learning_rate=lr),
        )
        for lr in (1e-3, 1.0)
    )
    assert small.recovered <= 1
    assert large.recovered >= (1 - LOSS) * alone(large)


def test_what_the_published_recipe_does_not_see_of_adam(films: Dataset) -> None:
    """Without the inversion's sizes, at the published scale and a gain of 10, Adam saturates: next to nothing."""
    recipe = replace(SGD, **ADAM)
    assert attacked(MedLeak(bins=256, queries=1, scale=1e-3, gain=1e4), films, 32, recipe=recipe).recovered <= 8


def test_overflow_is_a_failed_trial_and_no_breakdown(films: Dataset) -> None:
    """float16 overflows at the first sizes; others are sought, and an update that is not finite counts as nothing."""
    model = attacked(MedLeak(bins=8, scale=1.0), films, 4).observation.model
    knowledge = Knowledge(auxiliary=Auxiliary(films.images, films.targets))
    recipe = Recipe(update="delta", batch_size=4)
    view = ServerView(model, recipe, "delta", Plain(), 4, "malicious_server", frozenset(), knowledge)

    def sent(size: float) -> Broadcast:
        return Broadcast((replace(model, parameters={name: t * size for name, t in model.parameters.items()}),))

    best, trial = sought(
        view,
        Search([float("inf"), 1.0]),
        sent,
        lambda *_: Trial(0.5, 20.0, 0.1),
        leaking=1,
        generator=torch.Generator(),
    )
    assert (best, trial.share) == (1.0, 0.5)
    worst = sought(view, Search([float("inf")]), sent, lambda *_: trial, leaking=1, generator=torch.Generator())
    assert worst[1] == FAILED

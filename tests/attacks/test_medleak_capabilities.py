"""What a server gains that may also choose the recipe or the aggregation, and one that knows the clients' defense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from crafted_rounds import SGD, Round, alone_between
from crafted_rounds import attacked as attacked_round
from torch import Tensor, cat, tensor

from medpfl.attacks.crafted import ServerView, beyond_capabilities
from medpfl.attacks.medleak import MedLeak
from medpfl.core.domain import Auxiliary, Broadcast, Knowledge, Recipe
from medpfl.core.errors import AttackFailure
from medpfl.data.dataset import Dataset
from medpfl.defenses.laplace import Laplace
from medpfl.federation import Plain, SecAggPlus, SecureSum
from medpfl.metrics.scoring import pairwise_mse

ADAM: dict[str, Any] = {"optimizer": "adam", "learning_rate": 1e-3}
BINS = MedLeak(bins=256, queries=1)


def attacked(data: Dataset, *also: str, **other: Any) -> Round:
    return attacked_round(BINS, data, 32, sought=1, also=frozenset(also), **other)


def alone(found: Round) -> int:
    edges: Tensor = found.broadcast.secret["edges"][0]
    return alone_between(cat([edges, tensor([float("inf")]).double()]), found.private.double().flatten(1).mean(dim=1))


@pytest.mark.parametrize(
    ("also", "recipe"),
    [
        ("secure_aggregation", replace(SGD, **ADAM)),
        ("recipe", replace(SGD, **ADAM)),
        ("recipe", replace(SGD, local_steps=8, epochs=2)),
    ],
    ids=["Adam, narrow clipping", "Adam, large rate", "one step for sixteen"],
)
def test_what_protects_behind_secagg_is_gone_if_the_server_chooses_it(
    also: str, recipe: Recipe, films: Dataset
) -> None:
    channel = SecAggPlus(clients=2)
    bound, free = (attacked(films, *granted, channel=channel, recipe=recipe) for granted in ((), (also,)))
    assert bound.broadcast.recipe is None
    assert not bound.broadcast.aggregation
    assert bound.recovered < 0.6 * alone(bound)
    assert free.recovered >= 0.95 * alone(free) > 15
    assert any("the server told clients" in note for note in free.result.notes)


def test_a_server_tells_clients_nothing_where_the_agreed_serves_as_well(films: Dataset) -> None:
    found = attacked(films, "recipe", "secure_aggregation")
    assert found.broadcast.recipe is None
    assert not found.broadcast.aggregation


def test_noise_that_is_known_is_outgrown_by_a_smaller_scale(films: Dataset) -> None:
    """Laplace noise without clipping on every new weight: the calibrated module changes its weights by far more."""
    noise = Laplace(scale=0.01)
    found = attacked(films, defense=noise)
    assert found.recovered >= 0.95 * alone(found) > 15
    informed = float(found.broadcast.notes[0].split()[1])
    assert informed < 1e-3


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ({"recipe": Recipe(update="delta", learning_rate=1.0)}, None),
        ({"recipe": Recipe(update="weights")}, "differs in update"),
        ({"aggregation": {"clipping_range": 1.0}}, "`secure_aggregation`"),
    ],
    ids=["rate", "kind", "aggregation"],
)
def test_what_goes_beyond_the_capabilities_is_named(sent: Any, reason: str | None, films: Dataset) -> None:
    model = attacked_round(MedLeak(bins=8, scale=1.0), films, 4).observation.model
    recipe, can = Recipe(update="delta"), frozenset({"recipe"})
    knowledge = Knowledge(auxiliary=Auxiliary(films.images, films.targets))
    view = ServerView(model, recipe, "delta", Plain(), 1, "malicious_server", can, knowledge)
    found = beyond_capabilities(view, Broadcast((model,), **sent))
    assert found is None if reason is None else reason in (found or "")
    without = replace(view, can=frozenset())
    assert "without the capability" in (beyond_capabilities(without, Broadcast((model, model), **sent)) or "")


@pytest.mark.parametrize("channel", [SecureSum(clients=4), SecAggPlus(clients=4)], ids=["sum", "secagg"])
def test_units_of_their_own_tell_whose_images_came_back(channel: SecureSum | SecAggPlus, films: Dataset) -> None:
    """Every image above 30 dB is attributed to the client that holds it, and most of all clients' images are."""
    found = attacked_round(MedLeak(bins=512, mode="apart"), films, 16, channel=channel)
    whose, errors = found.result.clients, pairwise_mse(found.private.double(), found.result.images.double())
    assert whose is not None
    owners = torch.arange(4).repeat_interleave(16)
    right = [int(owners[row]) == int(whose[column]) for row, column in (errors < 1e-3).nonzero().tolist()]
    assert all(right)
    assert len(right) >= 0.8 * len(owners)


def test_too_many_clients_for_units_of_their_own_are_refused(films: Dataset) -> None:
    with pytest.raises(AttackFailure, match="too few of its 8 bins for each of 5 clients"):
        attacked_round(MedLeak(bins=8, mode="apart"), films, 2, channel=SecureSum(clients=5))

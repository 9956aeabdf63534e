"""A norm bound on the whole update stops MedLeak behind secure aggregation, and nothing that is read in full precision."""

from __future__ import annotations

import pytest
from crafted_rounds import attacked

from medpfl.attacks.medleak import MedLeak
from medpfl.data.dataset import Dataset
from medpfl.defenses import DeltaBound
from medpfl.federation import Channel, Plain, SecAggPlus
from medpfl.federation.hooks import NO_HOOKS

SIZE = 32
ATTACK = MedLeak(bins=256, queries=1)


@pytest.mark.parametrize(
    ("channel", "bound", "least", "most"),
    [
        (SecAggPlus(clients=2), None, SIZE // 2, SIZE),
        (SecAggPlus(clients=2), 0.1, 0, 1),
        (Plain(), 0.1, SIZE // 2, SIZE),
    ],
    ids=["secagg_plus", "secagg_plus, bound", "plain, bound"],
)
def test_what_a_server_that_knows_the_bound_recovers(
    channel: Channel, bound: float | None, least: int, most: int, films: Dataset
) -> None:
    hooks = NO_HOOKS if bound is None else DeltaBound(bound=bound)
    found = attacked(ATTACK, films, SIZE, channel=channel, sought=1, defense=hooks)
    assert least <= found.recovered <= most

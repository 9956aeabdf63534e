"""Vetting of what this package's own malicious servers send, seen by a client with its own images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medpfl.attacks import ATTACKS
from medpfl.attacks.crafted import CraftedAttack, ServerView
from medpfl.core.domain import CAPABILITIES, Auxiliary, Knowledge, Recipe
from medpfl.data import Dataset, load_dataset
from medpfl.data.readers.phantom import PhantomReader
from medpfl.federation import Channel, Plain, SecureSum
from medpfl.guards.vetting import vet
from medpfl.models import build_model

PRIVATE = 16


@pytest.fixture(scope="module")
def films() -> Dataset:
    return load_dataset(PhantomReader(kind="chest", count=120, seed=3), name="films", size=28, channels=1)


SENT = [
    ("medleak", {"bins": 128, "scale": 1e-4}, Plain(), "bins_at_work"),
    ("medleak", {"bins": 128, "scale": 1e-9}, SecureSum(clients=4), "bins_at_work"),
    ("robbing_the_fed", {"bins": 128, "scale": 1e-3, "query": "random"}, Plain(), "bins_at_work"),
    ("robbing_the_fed", {"bins": 128, "scale": 1e-3, "variant": "sparse"}, Plain(), "units_of_one_image"),
    ("robbing_the_fed", {"bins": 128, "scale": 1e-3, "connection": "residual"}, Plain(), "bins_at_work"),
    ("curious_abandon_honesty", {"units": 256, "scale": 0.5}, Plain(), "front_layers"),
    ("loki", {"bins": 128, "scale": 1e-3}, SecureSum(clients=4), "bins_at_work"),
]


@pytest.mark.parametrize(("name", "settings", "channel", "expected"), SENT)
def test_what_our_malicious_servers_send_is_found(
    name: str, settings: dict[str, Any], channel: Channel, expected: str, films: Dataset
) -> None:
    attack = ATTACKS[name].item(**settings)
    assert isinstance(attack, CraftedAttack)
    generator = torch.Generator().manual_seed(0)
    view = ServerView(
        model=build_model("lenet_idlg", image_shape=(1, 28, 28), task=films.task, generator=generator),
        recipe=Recipe(update="delta", learning_rate=0.1, batch_size=PRIVATE),
        update="delta",
        channel=channel,
        examples=PRIVATE,
        threat_model="malicious_server",
        can=frozenset(CAPABILITIES),
        knowledge=Knowledge(auxiliary=Auxiliary(films.images[PRIVATE:], films.targets[PRIVATE:])),
    )
    honest = vet(view.model, images=films.images[:PRIVATE])
    assert honest.passed, honest.reasons
    for number, model in enumerate(attack.prepare(view, generator).models):
        vetting = vet(model, images=films.images[:PRIVATE])
        assert vetting.verdict == "crafted"
        dead = name == "medleak" and number > 0
        assert ("dead_layer" if dead else expected) in {r.check for r in vetting.results if r.status == "found"}

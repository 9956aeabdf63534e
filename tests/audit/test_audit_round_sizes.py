"""The memory of an attacked round is stated before it runs, and holds: measured on every kind of channel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medpfl.attacks.crafted import BYTES_PER_ADDED, ServerView
from medpfl.attacks.medleak import MedLeak
from medpfl.audit.sizes import fitting_workers
from medpfl.core.domain import Auxiliary, Batch, Knowledge, Observation, Recipe
from medpfl.core.memory import machine_memory, peak_bytes
from medpfl.core.tasks import SingleLabel
from medpfl.federation import Channel, Plain, SecAggPlus, SecureSum, run_round
from medpfl.models import build_model

SHAPE = (1, 64, 64)


@pytest.mark.parametrize("kind", ["gradient", "weights"])
@pytest.mark.parametrize(
    "channel", [Plain(), SecureSum(clients=3), SecAggPlus(clients=3)], ids=lambda one: type(one).__name__
)
def test_no_round_takes_more_than_is_stated_and_none_takes_a_third(channel: Channel, kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    model = build_model("lenet_idlg", image_shape=SHAPE, task=SingleLabel(2), generator=generator)
    brightness = torch.linspace(0.1, 1, 40)[:, None, None, None]
    images, targets = brightness * torch.rand((40, *SHAPE), generator=generator), torch.arange(40) % 2
    recipe, attack = Recipe(update=kind, batch_size=4, learning_rate=0.1), MedLeak(bins=256, scale=1e-4, queries=2)
    knowledge = Knowledge(auxiliary=Auxiliary(images[4:], targets[4:]))
    view = ServerView(model, recipe, kind, channel, 4, "malicious_server", attack.needs(), knowledge)

    def whole_round() -> None:
        broadcast = attack.prepare(view, generator)
        clients = [(Batch(images[:4], targets[:4]), generator)] * channel.client_count
        update = run_round(broadcast, clients, recipe, channel=channel, generator=generator)
        seen = Observation(
            broadcast.model(0), update, recipe, "malicious_server", clients=channel.client_count, broadcast=broadcast
        )
        attack.reconstruct([seen], [generator])

    stated = (BYTES_PER_ADDED + channel.bytes_per_entry) * attack.added_parameters(model, channel.client_count)
    assert stated / 3 < peak_bytes(whole_round) <= stated


def test_workers_are_as_many_as_fit_side_by_side() -> None:
    half = int(0.45 * machine_memory())
    assert fitting_workers(8, [half // 100]) == 8
    assert fitting_workers(8, [half // 4, half // 100]) == 7
    assert fitting_workers(8, [half]) == 1
    assert fitting_workers(8, [0, 0]) == 8

"""One round over the plain channel."""

from __future__ import annotations

import pytest
import torch

from medpfl.core.domain import Batch, Broadcast, ClientState, GlobalModel, Recipe, Update
from medpfl.core.errors import SpecError
from medpfl.core.tasks import SingleLabel
from medpfl.federation import CHANNELS, Hooks, client_step, run_round
from medpfl.models import build_model


class Doubling(Hooks):
    """Doubles the update."""

    def update(
        self, update: Update, model: GlobalModel, state: ClientState, generator: torch.Generator
    ) -> tuple[Update, ClientState]:
        doubled = {name: 2 * tensor for name, tensor in update.trainable.items()}
        return Update(update.kind, doubled, update.buffers, update.counters, update.examples), state


def test_what_arrives_is_what_the_defended_client_sends() -> None:
    model = build_model(
        "lenet_idlg", image_shape=(1, 16, 16), task=SingleLabel(3), generator=torch.Generator().manual_seed(0)
    )
    batch = Batch(torch.rand((1, 1, 16, 16), generator=torch.Generator().manual_seed(1)), torch.tensor([2]))
    clients = [(batch, torch.Generator())]
    arrived = run_round(Broadcast((model,)), clients, Recipe(), hooks=Doubling(), generator=torch.Generator())
    sent, _ = client_step(model, batch, Recipe())
    for name, tensor in sent.trainable.items():
        torch.testing.assert_close(arrived.trainable[name], 2 * tensor)


class Pinned(Hooks):
    """Trains as agreed."""

    pins_agreement = True


def test_a_pinned_agreement_holds_against_what_the_server_tells() -> None:
    model = build_model(
        "lenet_idlg", image_shape=(1, 16, 16), task=SingleLabel(3), generator=torch.Generator().manual_seed(0)
    )
    batch = Batch(torch.rand((1, 1, 16, 16), generator=torch.Generator().manual_seed(1)), torch.tensor([2]))
    agreed, told = (Recipe(update="delta", learning_rate=rate) for rate in (0.1, 10.0))
    expected = {Hooks: client_step(model, batch, told)[0], Pinned: client_step(model, batch, agreed)[0]}
    for hooks, update in expected.items():
        broadcast = Broadcast((model,), recipe=told)
        clients = [(batch, torch.Generator())]
        arrived = run_round(broadcast, clients, agreed, hooks=hooks(), generator=torch.Generator())
        for name, tensor in update.trainable.items():
            assert torch.equal(arrived.trainable[name], tensor)


def test_the_plain_channel_shows_one_update() -> None:
    plain = CHANNELS["plain"].item()
    update = Update("gradient", {"w": torch.ones(2)}, {}, {}, 1)
    assert plain.send([update], torch.Generator()) is update
    assert plain.reveals_individual_updates
    with pytest.raises(ValueError, match="too many"):
        plain.send([update, update], torch.Generator())


def test_unknown_channels_are_refused_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match="plain"):
        CHANNELS["plane"]


def test_clients_do_what_the_broadcast_tells_them_in_place_of_what_was_agreed() -> None:
    model = build_model(
        "lenet_idlg", image_shape=(1, 16, 16), task=SingleLabel(3), generator=torch.Generator().manual_seed(0)
    )
    batch = Batch(torch.rand((4, 1, 16, 16), generator=torch.Generator().manual_seed(1)), torch.tensor([2, 0, 1, 1]))
    agreed = Recipe(update="delta", batch_size=1, local_steps=4)
    told = Recipe(update="delta", batch_size=4, learning_rate=3.0)
    clients = [(batch, torch.Generator())]
    arrived = run_round(Broadcast((model,), recipe=told), clients, agreed, generator=torch.Generator())
    expected, _ = client_step(model, batch, told)
    for name, tensor in expected.trainable.items():
        torch.testing.assert_close(arrived.trainable[name], tensor)
    with pytest.raises(SpecError, match="does not choose clipping_range"):
        run_round(
            Broadcast((model,), aggregation={"clipping_range": 1.0}), clients, agreed, generator=torch.Generator()
        )

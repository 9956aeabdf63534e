"""Federations in a loop: against plain PyTorch loops, with state that goes on, and images divided as asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from medpfl.core.domain import Batch, ClientState, GlobalModel, Recipe, Update
from medpfl.core.errors import SpecError
from medpfl.core.seeding import generator
from medpfl.core.session import State
from medpfl.federation.federated import FederationConfig, federate, outputs
from medpfl.federation.hooks import Hooks
from medpfl.federation.partitions import by_site, dirichlet, iid
from medpfl.federation.secure import SecAggPlus

STREAMS = partial(generator, "test")


@dataclass(frozen=True)
class Small:
    """A small net, as a module and as a global model, and random images divided among clients."""

    module: Callable[..., nn.Module]
    model: Callable[[nn.Module], GlobalModel]
    data: Callable[[int], Batch]

    def start(self, norm: bool = True) -> GlobalModel:
        return self.model(self.module(norm))

    def clients(self, *sizes: int) -> list[Batch]:
        whole, starts = self.data(sum(sizes)), [sum(sizes[:number]) for number in range(len(sizes))]
        places = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        return [Batch(whole.images[own], whole.targets[own]) for own in places]


@pytest.fixture
def small(
    seeded_module: Callable[..., nn.Module],
    global_model: Callable[[nn.Module], GlobalModel],
    data: Callable[[int], Batch],
) -> Small:
    return Small(seeded_module, global_model, data)


def plain_loop(module: nn.Module, data: Batch, make: Callable[[Any], torch.optim.Optimizer], steps: int) -> nn.Module:
    optimizer = make(module.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(module(data.images), data.targets))
        optimizer.step()
    return module


@pytest.mark.parametrize("update", ["delta", "weights"])
def test_averaged_full_batch_steps_are_gradient_descent_on_all_images(update: Any, small: Small) -> None:
    module = small.module(norm=False)
    config = FederationConfig(rounds=3, batch_size=64)
    recipe = config.recipe(Recipe(update=update, learning_rate=0.1, precision="float64"))
    found = federate(small.start(norm=False), small.clients(4, 9, 2), recipe, config, STREAMS)
    expected = plain_loop(module, small.data(15), lambda own: torch.optim.SGD(own, lr=0.1), 3)
    for name, tensor in expected.named_parameters():
        torch.testing.assert_close(found.parameters[name], tensor.detach(), rtol=1e-9, atol=1e-12)


def test_averaged_gradients_drive_the_servers_adam(small: Small) -> None:
    module = small.module(norm=False)
    config = FederationConfig(rounds=2, batch_size=64, local_epochs=2)
    recipe = config.recipe(Recipe(update="gradient", precision="float64"))
    assert (recipe.optimizer, recipe.learning_rate) == ("adam", 0.001)
    found = federate(small.start(norm=False), small.clients(4, 9, 2), recipe, config, STREAMS)
    expected = plain_loop(module, small.data(15), lambda own: torch.optim.Adam(own, lr=0.001), 4)
    for name, tensor in expected.named_parameters():
        torch.testing.assert_close(found.parameters[name], tensor.detach(), rtol=1e-7, atol=1e-10)


@dataclass(frozen=True)
class Delayed(Hooks):
    """Sends what the round before gave: a state that must go on from round to round, for each client its own."""

    def update(
        self, update: Update, model: GlobalModel, state: ClientState, generator: torch.Generator
    ) -> tuple[Update, ClientState]:
        held = state.tensors or {name: torch.zeros_like(tensor) for name, tensor in update.trainable.items()}
        return replace(update, trainable=held), ClientState(state.rounds, dict(update.trainable))


@pytest.mark.parametrize("update", ["delta", "gradient"])
def test_what_a_defense_keeps_goes_on_over_rounds(update: Any, small: Small) -> None:
    """One round late: from the second round on, the model moves as an undefended one did a round before."""
    start = small.start(norm=False)
    recipe = Recipe(update=update, learning_rate=0.1, precision="float64")

    def after(rounds: int, hooks: Hooks) -> GlobalModel:
        config = FederationConfig(rounds=rounds, batch_size=64, optimizer="sgd", learning_rate=0.1)
        return federate(start, small.clients(5, 3), config.recipe(recipe), config, STREAMS, hooks=hooks)

    name = "fc.weight"
    assert torch.equal(after(1, Delayed()).parameters[name], start.parameters[name])
    torch.testing.assert_close(after(2, Delayed()).parameters[name], after(1, Hooks()).parameters[name])


@dataclass(frozen=True)
class Halving(Hooks):
    """A server that learns half of what arrives."""

    def aggregated(self, update: Update, clients: int, generator: torch.Generator) -> Update:
        assert clients == 2
        return replace(update, trainable={name: tensor / 2 for name, tensor in update.trainable.items()})


@pytest.mark.parametrize("update", ["delta", "gradient"])
def test_the_server_learns_from_what_a_defense_makes_of_the_mean(update: Any, small: Small) -> None:
    start, recipe = small.start(norm=False), Recipe(update=update, precision="float64")
    moves = []
    for hooks in (Hooks(), Halving()):
        config = FederationConfig(rounds=1, batch_size=64, optimizer="sgd", learning_rate=0.1)
        found = federate(start, small.clients(5, 3), config.recipe(recipe), config, STREAMS, hooks=hooks)
        moves.append(found.parameters["fc.weight"] - start.parameters["fc.weight"])
    torch.testing.assert_close(moves[1], moves[0] / 2)


def test_a_federation_goes_on_to_the_bit_where_it_was_stopped(small: Small) -> None:
    config = FederationConfig(rounds=4, batch_size=4)
    recipe = config.recipe(Recipe(update="gradient", batch_norm="train"))
    kept: list[State] = []

    class Stopped:
        def __init__(self, start: State | None) -> None:
            self._start = start

        def restore(self) -> State | None:
            return self._start

        def checkpoint(self, done: int, total: int, state: Callable[[], State]) -> None:
            if self._start is None and done == 2:
                kept.append(state())
                raise KeyboardInterrupt

    def run(session: Any) -> GlobalModel:
        start = small.start()
        return federate(start, small.clients(9, 6), recipe, config, STREAMS, hooks=Delayed(), session=session)

    with pytest.raises(KeyboardInterrupt):
        run(Stopped(None))
    resumed, whole = run(Stopped(kept[0])), run(Stopped({**kept[0], **fresh_start(small)}))
    for part in ("parameters", "buffers", "counters"):
        for name, tensor in getattr(whole, part).items():
            assert torch.equal(getattr(resumed, part)[name], tensor), name


def fresh_start(small: Small) -> State:
    """A snapshot before the first round."""
    model = small.start().to(torch.float32)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.parameters.items()}
    return {
        "round": 0,
        "parameters": dict(model.parameters),
        "buffers": dict(model.buffers),
        "counters": dict(model.counters),
        "steps": torch.zeros((), dtype=torch.int64),
        "first": zeros,
        "second": zeros,
        "clients": [{"rounds": 0, "tensors": {}}] * 2,
    }


def test_secure_aggregation_rounds_and_does_not_change_more(small: Small) -> None:
    config = FederationConfig(rounds=2, batch_size=4)
    recipe = config.recipe(Recipe(update="weights", learning_rate=0.1))
    start, holders = small.start(), small.clients(9, 6)
    exact = federate(start, holders, recipe, config, STREAMS)
    rounded = federate(start, holders, recipe, config, STREAMS, channel=SecAggPlus(clients=2, max_weight=15.0))
    step = 2 * 8.0 / 2**22 * 15.0 / 6
    for name, tensor in exact.parameters.items():
        assert not torch.equal(rounded.parameters[name], tensor)
        torch.testing.assert_close(rounded.parameters[name], tensor, atol=20 * step, rtol=0)


def test_outputs_are_those_of_the_module_in_eval_mode(small: Small) -> None:
    module, data = small.module().eval(), small.data(7)
    found = outputs(small.start(), data.images, size=3)
    torch.testing.assert_close(found, module(data.images).detach())


def held(places: tuple[tuple[int, ...], ...], values: list[int]) -> list[Counter[int]]:
    return [Counter(values[place] for place in own) for own in places]


def test_clients_of_an_iid_partition_are_alike() -> None:
    classes = [0] * 40 + [1] * 17 + [2] * 3
    found = iid([str(place) for place in range(60)], classes, 4, torch.Generator().manual_seed(0))
    assert sorted(place for own in found for place in own) == list(range(60))
    for name, total in Counter(classes).items():
        assert all(total // 4 <= client[name] <= -(-total // 4) for client in held(found, classes))


def test_a_patient_is_in_one_hospital_only() -> None:
    patients = [str(place // 5) for place in range(60)]
    for found in (
        iid(patients, [0] * 30 + [1] * 30, 3, torch.Generator().manual_seed(0)),
        dirichlet(patients, [0] * 30 + [1] * 30, 3, 0.5, torch.Generator().manual_seed(0)),
    ):
        homes = {
            patient: {number for number, own in enumerate(found) for place in own if patients[place] == patient}
            for patient in patients
        }
        assert all(len(home) == 1 for home in homes.values())


def test_a_small_concentration_makes_clients_unlike() -> None:
    classes = [place % 4 for place in range(400)]
    names = [str(place) for place in range(400)]

    def largest_share(concentration: float) -> float:
        found = dirichlet(names, classes, 4, concentration, torch.Generator().manual_seed(1))
        assert sorted(place for own in found for place in own) == list(range(400))
        return max(max(client.values()) / client.total() for client in held(found, classes))

    assert largest_share(0.1) > 0.6
    assert largest_share(1000.0) < 0.32


def test_hospitals_are_clients() -> None:
    assert by_site(["b", "a", "b", "a", "b"]) == ((1, 3), (0, 2, 4))


@pytest.mark.parametrize(
    ("sites", "expected"),
    [([None, None], "names none"), (["a", None], "1 of 2"), (["a", "a"], "all training images are of one")],
)
def test_hospitals_that_are_not_known_are_refused(sites: list[str | None], expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        by_site(sites)


def test_too_many_clients_for_a_skewed_partition_are_refused() -> None:
    with pytest.raises(SpecError, match="left one of 5 clients without any"):
        dirichlet(["a", "b", "c"], [0, 0, 1], 5, 0.1, torch.Generator().manual_seed(0))


def test_the_batch_of_an_attack_is_no_batch_for_training() -> None:
    assert FederationConfig().recipe(Recipe(batch_size=1)).batch_size == 16
    assert FederationConfig().recipe(Recipe(batch_size=32)).batch_size == 32
    assert FederationConfig(batch_size=2).recipe(Recipe(batch_size=32)).batch_size == 2
    kept = FederationConfig().recipe(Recipe(update="delta", optimizer="adamw", learning_rate=0.03, epochs=3))
    assert (kept.update, kept.optimizer, kept.learning_rate, kept.epochs) == ("delta", "adamw", 0.03, 3)

"""The leakage gate on whole client rounds: crafted models are stopped, honest clients go on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from medpfl.attacks.crafted import ServerView
from medpfl.attacks.medleak import MedLeak
from medpfl.core.domain import Auxiliary, Batch, GlobalModel, Knowledge, Recipe
from medpfl.core.tasks import SingleLabel
from medpfl.data import load_dataset
from medpfl.data.dataset import Dataset
from medpfl.data.readers.phantom import PhantomReader
from medpfl.federation import Plain
from medpfl.federation.client import client_step, drawn_steps
from medpfl.federation.guarding import Received, Trained, Verdict
from medpfl.federation.hooks import NO_HOOKS
from medpfl.federation.training import TrainingConfig, train
from medpfl.guards import LeakageGate, NormBound, SameModel, VettingGuard
from medpfl.guards.base import Guard
from medpfl.guards.participation import WithholdLimit, may_take_part
from medpfl.models import build_model, prepare


@pytest.fixture(scope="module")
def films() -> Dataset:
    return load_dataset(PhantomReader(count=400, kind="chest"), name="films", size=28, channels=1, aspect="squash")


def lenet(data: Dataset) -> GlobalModel:
    generator = torch.Generator().manual_seed(1)
    return build_model("lenet_idlg", image_shape=(1, 28, 28), task=data.task, generator=generator)


def dense(data: Dataset, width: int = 256) -> GlobalModel:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, data.task.classes))
    return prepare(module, name="dense", image_shape=(1, 28, 28), task=SingleLabel(data.task.classes))


def crafted(data: Dataset, **settings: Any) -> GlobalModel:
    attack = MedLeak(**{"bins": 256, "scale": 1e-4, **settings})
    view = ServerView(
        model=lenet(data),
        recipe=None,
        update="weights",
        channel=Plain(),
        examples=32,
        threat_model="malicious_server",
        can=attack.needs(),
        knowledge=Knowledge(auxiliary=Auxiliary(data.images[100:], data.targets[100:])),
    )
    return attack.prepare(view, torch.Generator().manual_seed(0)).model(0)


def sent(guard: Guard, model: GlobalModel, data: Dataset, images: int, **changes: Any) -> Verdict:
    """What the guard says to the update of a client that holds the first images."""
    recipe = replace(Recipe(update="weights", learning_rate=0.1, batch_size=images), **changes)
    batch = Batch(data.images[:images], data.targets[:images])
    generator = torch.Generator().manual_seed(0)
    steps = drawn_steps(batch, recipe, NO_HOOKS, generator)
    update, _ = client_step(model, batch, recipe, generator=generator, steps=steps)
    found = guard.after(Trained(Received(model, batch, recipe), update, steps))
    assert found is not None
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"update": "gradient"},
        {"update": "delta", "momentum": 0.9, "weight_decay": 1e-3},
        {"batch_size": 8, "local_steps": 4},
        {"batch_size": 8, "local_steps": 4, "shuffle": True, "epochs": 2},
        {"precision": "bfloat16"},
    ],
)
def test_a_leaking_module_is_crafted_however_the_client_trains(films: Dataset, changes: dict[str, Any]) -> None:
    found = sent(LeakageGate(), crafted(films), films, 32, **changes)
    assert (found.level, found.withholds) == ("crafted", True)
    assert any("images come back" in reason for reason in found.reasons)


def test_the_published_module_is_crafted_although_it_moves_little(films: Dataset) -> None:
    found = sent(LeakageGate(), crafted(films, scale=1.0, queries=1), films, 32)
    assert found.level == "crafted"
    assert not any("times its own size" in reason for reason in found.reasons)


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize("steps", [0, 50])
@pytest.mark.parametrize("name", ["lenet_idlg", "cnn_fedavg", "resnet18_cifar"])
def test_honest_clients_of_convolutional_nets_send(films: Dataset, name: str, steps: int, size: int) -> None:
    if name == "resnet18_cifar" and (steps, size) != (0, 8):
        pytest.skip("takes too long")
    generator = torch.Generator().manual_seed(2)
    model = build_model(name, image_shape=(1, 28, 28), task=films.task, generator=generator)
    if steps:
        model, _ = train(model, films.images[100:], films.targets[100:], TrainingConfig(steps=steps), generator)
    assert sent(LeakageGate(), model, films, size) == Verdict("leakage_gate", "passed", False)


@pytest.mark.parametrize("size", [1, 8, 32])
def test_honest_dense_nets_leak_and_are_not_crafted(films: Dataset, size: int) -> None:
    found = sent(LeakageGate(), dense(films), films, size)
    assert (found.level, found.withholds) == ("leaks", True)
    assert not sent(LeakageGate(withhold="crafted"), dense(films), films, size).withholds
    assert sent(LeakageGate(images=size), dense(films), films, size).level == "passed"


def test_numbers_that_are_not_finite_are_never_sent(films: Dataset) -> None:
    model = lenet(films)
    broken = replace(model, parameters={**model.parameters, "fc.bias": torch.full((films.task.classes,), torch.nan)})
    for guard in (LeakageGate(), NormBound()):
        found = sent(guard, broken, films, 4)
        assert (found.level, found.withholds) == ("unusable", True)
        assert "not finite" in found.reasons[0]
    received = Received(broken, Batch(films.images[:4], films.targets[:4]), Recipe())
    before = VettingGuard().before(received)
    assert (before.level, before.withholds) == ("unusable", True)


def test_an_honest_training_that_diverges_is_unusable_and_not_crafted(films: Dataset) -> None:
    guard = LeakageGate(withhold="crafted")
    found = sent(guard, lenet(films), films, 16, learning_rate=1e4)
    assert (found.level, found.withholds) == ("unusable", True)
    assert "diverged" in found.reasons[0]


def test_the_norm_bound_measures_what_is_sent(films: Dataset) -> None:
    recipe = {"update": "delta", "learning_rate": 0.1}
    batch = Batch(films.images[:8], films.targets[:8])
    update, _ = client_step(lenet(films), batch, Recipe(update="delta", learning_rate=0.1, batch_size=8))
    length = float(torch.cat([tensor.flatten() for tensor in update.trainable.values()]).norm())
    for kind in ("delta", "weights"):
        assert not sent(NormBound(bound=1.001 * length), lenet(films), films, 8, **{**recipe, "update": kind}).withholds
        assert sent(NormBound(bound=0.999 * length), lenet(films), films, 8, **{**recipe, "update": kind}).withholds


def test_who_received_another_model_than_others_stays_away(films: Dataset) -> None:
    model, batch = lenet(films), Batch(films.images[:2], films.targets[:2])
    same = replace(model, parameters={name: tensor.clone() for name, tensor in model.parameters.items()})
    other = replace(model, parameters={**model.parameters, "fc.bias": model.parameters["fc.bias"] + 1e-7})
    assert not SameModel().before(Received(model, batch, Recipe(), (model, same))).withholds
    assert SameModel().before(Received(model, batch, Recipe(), (model, other))).withholds


def test_a_client_that_stays_away_stays_away() -> None:
    limit = WithholdLimit(withheld=2, rounds=3)
    history = [False, True, False, True]
    for _ in range(5):
        assert not may_take_part(history, limit)
    with pytest.raises(ValueError, match="can never be reached"):
        WithholdLimit(withheld=4, rounds=3)

"""SRATTA: whose units were active when, against a plain replay of the clients, and no group that joins two clients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from medpfl.attacks.co_activation import Active, active_images, of_one_client
from medpfl.attacks.sratta import Sratta
from medpfl.core.domain import Batch, Broadcast, Failure, GlobalModel, Observation, Recipe, Reconstruction
from medpfl.core.tasks import SingleLabel
from medpfl.federation import SecureSum, run_round
from medpfl.models import build_model, prepare

STEPS = Recipe(update="weights", learning_rate=0.1, batch_size=2, local_steps=4)


def dense(units: int = 600, classes: int = 4, seed: int = 0) -> GlobalModel:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Flatten(), hidden := nn.Linear(64, units), nn.ReLU(), nn.Linear(units, classes))
    with torch.no_grad():  # as after training: a unit is active for few images
        hidden.bias.copy_(-hidden.weight.sum(dim=1) / 2 - 0.25)
    return prepare(layers, name="dense", image_shape=(1, 8, 8), task=SingleLabel(classes))


@dataclass(frozen=True)
class Aggregate:
    """Three clients' images, in order, and what an honest server sees of their sum."""

    batches: tuple[Batch, ...]
    observation: Observation

    @property
    def images(self) -> Tensor:
        return torch.cat([batch.images for batch in self.batches])

    @property
    def owners(self) -> Tensor:
        return torch.arange(len(self.images)) // len(self.batches[0])


def aggregate(seed: int, recipe: Recipe = STEPS, clients: int = 3) -> Aggregate:
    generator, size = torch.Generator().manual_seed(seed), recipe.private_images
    batches = tuple(
        Batch(torch.rand((size, 1, 8, 8), generator=generator), torch.randint(4, (size,), generator=generator))
        for _ in range(clients)
    )
    model = dense(seed=seed)
    channel = SecureSum(clients=clients)
    update = run_round(
        Broadcast((model,)), [(batch, generator) for batch in batches], recipe, channel=channel, generator=generator
    )
    return Aggregate(batches, Observation(model, update, recipe, "honest_server", clients=clients))


def attack(seen: Observation) -> Reconstruction:
    (result,) = Sratta().reconstruct([seen], [torch.Generator()])
    assert isinstance(result, Reconstruction), result
    return result


def which(images: Tensor, found: Tensor) -> list[int]:
    """The place of each found image among the true ones; they must be equal up to rounding."""
    distances = torch.cdist(found.double().flatten(1), images.double().flatten(1)) / images[0].numel() ** 0.5
    assert float(distances.amin(dim=1).max()) < 1e-3
    return [int(place) for place in distances.argmin(dim=1)]


def test_groups_never_join_two_clients_and_there_are_some() -> None:
    attributed, found = 0, 0
    for seed in range(6):
        played = aggregate(seed)
        result = attack(played.observation)
        owners = played.owners[which(played.images, result.images)]
        assert result.clients is not None
        assert len(result.images) <= played.observation.examples
        for number in range(int(result.clients.max()) + 1):
            assert len(set(owners[result.clients == number].tolist())) == 1
        attributed += int((result.clients >= 0).sum())
        found += len(result.images)
    assert found >= 30
    assert attributed >= 6


def test_most_labels_come_back_too() -> None:
    played = aggregate(0)
    result = attack(played.observation)
    targets = torch.cat([batch.targets for batch in played.batches])
    assert result.labels is not None
    right = result.labels == targets[which(played.images, result.images)]
    assert float(right.double().mean()) >= 0.8


def replayed(played: Aggregate) -> list[set[int]]:
    """The images that gave each unit a gradient in some local step, by plain training of every client."""
    recipe, model = played.observation.recipe, played.observation.model
    assert recipe is not None
    held: list[set[int]] = [set() for _ in range(600)]
    for client, batch in enumerate(played.batches):
        own = {name: tensor.clone().requires_grad_() for name, tensor in model.parameters.items()}
        for step in range(recipe.local_steps):
            places = range(step * recipe.batch_size, (step + 1) * recipe.batch_size)
            images, targets = batch.images[list(places)].flatten(1), batch.targets[list(places)]
            values = images @ own["1.weight"].T + own["1.bias"]
            for row, place in enumerate(places):
                for unit in (values[row] > 0).nonzero().flatten().tolist():
                    held[unit].add(client * len(batch) + place)
            scores = torch.relu(values) @ own["3.weight"].T + own["3.bias"]
            gradients = torch.autograd.grad(nn.functional.cross_entropy(scores, targets), list(own.values()))
            with torch.no_grad():
                for tensor, gradient in zip(own.values(), gradients, strict=True):
                    tensor -= recipe.learning_rate * gradient
    return held


def test_the_images_that_activated_a_unit_are_those_of_a_replay() -> None:
    played = aggregate(1)
    truth, model = replayed(played), played.observation.model
    inputs = played.images.flatten(1).double()
    before = inputs @ model.parameters["1.weight"].double().T + model.parameters["1.bias"].double()
    assert isinstance(played.observation.update.trainable["1.weight"], Tensor)
    change = {
        name: (model.parameters[name] - played.observation.update.trainable[name]).double() for name in model.parameters
    }
    targets = torch.cat([batch.targets for batch in played.batches])
    scores = torch.relu(before) @ model.parameters["3.weight"].double().T + model.parameters["3.bias"].double()
    wrong = torch.softmax(scores, dim=1) - nn.functional.one_hot(targets, 4)
    expected = wrong @ model.parameters["3.weight"].double() * 0.1 / (3 * 2)  # rate / (clients * batch)
    active = active_images(change["1.weight"], change["1.bias"], inputs, before, expected, 1e-4, 0.6)
    right = [set(one.before | one.newly) == truth[one.unit] for one in active]
    assert len(active) >= 300
    assert sum(right) / len(right) >= 0.97
    assert any(one.newly for one in active)
    assert all(bool((before[sorted(one.before), one.unit] > 0).all()) for one in active)


def active(before: set[int], newly: set[int]) -> Active:
    return Active(0, frozenset(before), frozenset(newly))


def test_images_are_joined_where_only_one_client_can_have_moved_the_unit() -> None:
    assert of_one_client([active({0}, {1}), active({2}, set()), active({3, 4}, {5})], 6) == [{0, 1}]
    assert of_one_client([active({0, 1}, {2}), active({0}, {1})], 4) == [{0, 1, 2}]  # only once 0 and 1 are known
    assert of_one_client([active({0}, {1}), active({3}, {2}), active({2}, {1})], 4) == [{0, 1, 2, 3}]
    assert of_one_client([active(set(), {1, 2})], 3) == []


def test_a_mixture_is_no_image_and_one_that_others_hide_does_not_come_back() -> None:
    """Two images that are active in exactly the same units are never seen alone."""
    played = aggregate(2)
    batch = played.batches[0]
    twins = torch.cat([batch.images[:1], batch.images[:1] + 1e-4, batch.images[2:]]).clamp(0, 1)
    targets = torch.cat([batch.targets[:1], batch.targets[:1], batch.targets[2:]])
    model, generator = played.observation.model, torch.Generator().manual_seed(0)
    clients = [(Batch(twins, targets), generator), *[(one, generator) for one in played.batches[1:]]]
    update = run_round(Broadcast((model,)), clients, STEPS, channel=SecureSum(clients=3), generator=generator)
    found = attack(replace(played.observation, update=update)).images.double().flatten(1)
    distances = torch.cdist(found, twins[:1].double().flatten(1)) / 8
    assert float(distances.min()) > 0.05


def test_what_it_cannot_do_is_refused_with_the_reason() -> None:
    model, sratta = dense(), Sratta()
    assert sratta.why_not(model, STEPS, "weights", 24) is None
    for recipe, reason in [
        (replace(STEPS, local_steps=1), "one local step"),
        (replace(STEPS, update="gradient"), "one local step"),
        (replace(STEPS, optimizer="adam"), "needs SGD"),
        (replace(STEPS, weight_decay=1e-4), "weight decay"),
        (None, "withheld"),
    ]:
        assert reason in (
            sratta.why_not(model, recipe, "gradient" if recipe and recipe.update == "gradient" else "weights", 24) or ""
        )
    generator, task = torch.Generator().manual_seed(0), SingleLabel(4)
    lenet = build_model("lenet_idlg", image_shape=(1, 12, 12), task=task, generator=generator)
    assert "no dense layer" in (sratta.why_not(lenet, STEPS, "weights", 24) or "")
    played = aggregate(0, replace(STEPS, local_steps=1))
    (result,) = sratta.reconstruct([played.observation], [torch.Generator()])
    assert isinstance(result, Failure)
    assert "one local step" in result.reason


@pytest.mark.parametrize("epochs", [1, 2])
def test_momentum_and_epochs(epochs: int) -> None:
    played = aggregate(3, replace(STEPS, momentum=0.5, epochs=epochs, learning_rate=0.03))
    result = attack(played.observation)
    owners = played.owners[which(played.images, result.images)]
    assert result.clients is not None
    assert len(result.images) >= 3
    for number in range(int(result.clients.max()) + 1):
        assert len(set(owners[result.clients == number].tolist())) == 1

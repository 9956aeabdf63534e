"""ARES: exact where the filters are injective, basis pursuit against a linear program, refusals with reasons."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attacked_rounds import AttackedRound, alone_in_bins, attacked_round, count_recovered
from scipy.fft import dctn
from scipy.optimize import linprog
from torch import Tensor, nn

from medpfl.attacks.activation_inverse import (
    Activations,
    activations,
    block_cosines,
    least_squares,
    random_front,
    sparsest,
)
from medpfl.attacks.ares import Ares
from medpfl.attacks.latent_bins import HiddenLayer, hidden_layer
from medpfl.core.domain import Auxiliary, Batch, GlobalModel, Recipe
from medpfl.core.tasks import SingleLabel
from medpfl.data import load_dataset
from medpfl.data.readers.medmnist import MedMnistReader
from medpfl.federation import Channel, Plain, SecAggPlus, SecureSum
from medpfl.models import build_model, prepare

SHARED = os.environ.get("MEDPFL_DATA")
SGD = Recipe(update="weights", learning_rate=0.1)
ADAM = Recipe(update="weights", optimizer="adam", learning_rate=1e-3)


def convolutional(
    channels: int, shape: tuple[int, ...] = (1, 12, 12), units: int = 128, *more: nn.Module
) -> GlobalModel:
    """Two convolutions that keep the size, a dense layer with ReLU, another one."""
    torch.manual_seed(0)
    flat = channels * shape[1] * shape[2]
    layers = [
        nn.Conv2d(shape[0], channels, 5, padding=2), nn.ReLU(), *more, nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(flat, units), nn.ReLU(), nn.Linear(units, 3),
    ]  # fmt: skip
    return prepare(nn.Sequential(*layers), name="net", image_shape=shape, task=SingleLabel(3))


def smooth(count: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Images whose 8x8 blocks have 6 cosine coefficients each, in [0.05, 1]: sparse in the attack's own basis."""
    generator = torch.Generator().manual_seed(seed)
    _, back = block_cosines(shape)
    found = []
    for _ in range(count):
        coefficients = torch.zeros(shape, dtype=torch.float64)
        coefficients[:, :3, :2] = torch.randn((shape[0], 3, 2), generator=generator, dtype=torch.float64)
        image = back(coefficients.reshape(-1)).reshape(shape)
        image = (image - image.min()) / (image.max() - image.min())
        found.append(0.05 + (0.3 + 0.65 * float(torch.rand((), generator=generator))) * image)
    return torch.stack(found).float()


def ares_round(
    attack: Ares, model: GlobalModel, images: Tensor, size: int, *, channel: Channel | None = None, recipe: Recipe = SGD
) -> AttackedRound:
    channel = channel or Plain()
    targets, held = torch.arange(len(images)) % 3, size * channel.client_count
    batches = [Batch(images[start : start + size], targets[start : start + size]) for start in range(0, held, size)]
    auxiliary = Auxiliary(images[held:], targets[held:])
    return attacked_round(attack, model, batches, auxiliary, replace(recipe, batch_size=size), channel=channel)


def readable(found: AttackedRound) -> Tensor:
    """Images whose mean activation is alone in its bin, computed from the filters that were sent."""
    model = found.observation.model
    filters = next(iter(model.parameters.values()))
    images = torch.cat(found.clients)
    seen = torch.relu(nn.functional.conv2d(images, filters, padding=2)).flatten(1)
    return alone_in_bins(seen, found.broadcast.secret["edges"])


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 8, 8)], ids=["grey", "color"])
@pytest.mark.parametrize("solver", ["sparse", "least_squares"])
def test_images_are_exact_where_the_filters_are_injective(solver: Any, shape: tuple[int, ...]) -> None:
    """Twelve channels give more equations than pixels; in float64 nothing but rounding is left."""
    recipe = replace(SGD, precision="float64", update="gradient")
    found = ares_round(Ares(solver=solver), convolutional(12, shape), smooth(300, shape), 12, recipe=recipe)
    mask = readable(found)
    assert count_recovered(found.clients[0][mask], found.result.images, below=1e-9) == int(mask.sum()) >= 8
    assert "0 with fewer entries" in found.result.notes[-1]


@pytest.mark.parametrize("channel", [Plain(), SecureSum(clients=2)], ids=["plain", "secure sum"])
def test_one_step_of_adam_is_read_like_one_of_sgd(channel: Channel) -> None:
    """Gradients far below epsilon move the weights in proportion, so that even a sum over clients adds gradients up."""
    found = ares_round(
        Ares(solver="least_squares"), convolutional(12), smooth(300, (1, 12, 12)), 8, channel=channel, recipe=ADAM
    )
    mask = readable(found)
    images = torch.cat(found.clients)[mask]
    assert count_recovered(images, found.result.images, below=1e-3) >= 0.9 * int(mask.sum()) >= 5


def test_the_equations_leave_nothing_over_and_their_solution_is_the_image() -> None:
    system, images = system_of(12, (1, 12, 12)), smooth(4, (1, 12, 12)).double()
    seen = torch.relu(nn.functional.conv2d(images, next(iter(system.model.parameters.values())), padding=2)).flatten(1)
    torch.testing.assert_close(torch.relu(system.before(images)), seen)
    found = least_squares(system, seen)
    torch.testing.assert_close(found, images, atol=1e-8, rtol=0)
    torch.testing.assert_close(torch.relu(system.before(found)), seen, atol=1e-9, rtol=0)


def test_the_architecture_stays_as_agreed_and_all_clients_get_the_same() -> None:
    model = convolutional(4)
    found = ares_round(Ares(scale=1.0), model, smooth(100, (1, 12, 12)), 4, channel=SecureSum(clients=2))
    sent = found.broadcast.models
    assert len(sent) == 1
    assert sent[0].module is model.module
    assert {name: tensor.shape for name, tensor in sent[0].parameters.items()} == {
        name: tensor.shape for name, tensor in model.parameters.items()
    }
    filters = next(iter(sent[0].parameters.values())).flatten(1)
    torch.testing.assert_close(filters.norm(dim=1), torch.ones(4))
    assert Ares().needs() == {"parameters"}
    assert Ares().added_parameters(model, clients=2) == 0


@pytest.mark.parametrize("channel", [SecureSum(clients=3), SecAggPlus(clients=3)], ids=["secure sum", "secagg"])
def test_behind_secure_aggregation_all_clients_images_come_back(channel: Channel) -> None:
    found = ares_round(Ares(), convolutional(12), smooth(300, (1, 12, 12)), 6, channel=channel)
    mask = readable(found)
    private = torch.cat(found.clients)[mask]
    assert count_recovered(private, found.result.images) >= 0.9 * len(private) >= 9
    assert len(found.result.images) <= found.observation.examples


def system_of(channels: int, shape: tuple[int, ...]) -> Activations:
    model = convolutional(channels, shape)
    layer = hidden_layer(model)
    assert isinstance(layer, HiddenLayer)
    crafted = random_front(model, layer, torch.Generator().manual_seed(3))
    assert isinstance(crafted, GlobalModel)
    system = activations(crafted, layer)
    assert isinstance(system, Activations)
    return system


def test_with_few_equations_the_sparse_image_is_found_where_least_squares_fail() -> None:
    images = smooth(300, (1, 16, 16))
    rounds = {}
    for solver in ("sparse", "least_squares"):
        attack = Ares(solver=solver, iterations=1000, tolerance=10.0)
        rounds[solver] = ares_round(attack, convolutional(2, (1, 16, 16)), images, 8)
    mask = readable(rounds["sparse"])
    private = rounds["sparse"].clients[0][mask]
    counts = {solver: count_recovered(private, found.result.images) for solver, found in rounds.items()}
    assert counts["sparse"] >= counts["least_squares"] + 3
    assert counts["sparse"] >= 0.6 * len(private)


def test_basis_pursuit_agrees_with_a_linear_program() -> None:
    shape = (1, 8, 8)
    system, image = system_of(1, shape), smooth(1, shape, seed=4).double()
    matrix, offset = system.matrix()
    torch.testing.assert_close(system.before(image)[0], matrix @ image.flatten() + offset)
    seen = torch.relu(matrix @ image.flatten() + offset)
    active = seen > 0
    assert 10 < int(active.sum()) < 64
    transform, back = block_cosines(shape)
    basis = torch.stack([back(unit) for unit in torch.eye(64, dtype=torch.float64)], dim=1)
    equations = (matrix[active] @ basis).numpy()
    solved = linprog(np.ones(128), A_eq=np.hstack([equations, -equations]), b_eq=(seen - offset)[active].numpy())
    found = sparsest(matrix, offset, seen, shape, 10_000)
    assert float(transform(found.flatten()).abs().sum()) == pytest.approx(solved.fun, rel=1e-4)
    torch.testing.assert_close((matrix @ found.flatten() + offset)[active], seen[active], atol=1e-8, rtol=0)


def test_block_cosines_are_the_textbook_transform_of_every_block() -> None:
    image = torch.rand((2, 16, 11), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    transform, back = block_cosines((2, 16, 11))
    found = transform(image.flatten()).reshape(2, 16, 11)
    expected = dctn(image[1, 8:16, :8].numpy(), norm="ortho")
    np.testing.assert_allclose(found[1, 8:16, :8].numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(found[0, :8, 8:].numpy(), dctn(image[0, :8, 8:].numpy(), norm="ortho"), atol=1e-12)
    torch.testing.assert_close(back(found.flatten()), image.flatten())


def test_what_it_cannot_do_is_refused_with_the_reason() -> None:
    model = convolutional(4)
    assert Ares().why_not(model, SGD, "weights", 4) is None
    assert Ares().why_not(model, ADAM, "weights", 4) is None
    assert "adam" in (Ares().why_not(model, replace(ADAM, local_steps=2), "weights", 4) or "")
    assert "recipe is withheld" in (Ares().why_not(model, None, "weights", 4) or "")
    assert Ares(scale=1.0).why_not(model, None, "weights", 4) is None
    task, generator = SingleLabel(3), torch.Generator().manual_seed(0)
    pooling = build_model("cnn_fedavg", image_shape=(1, 12, 12), task=task, generator=generator)
    assert "pooling" in (Ares().why_not(pooling, SGD, "weights", 4) or "")
    lenet = build_model("lenet_idlg", image_shape=(1, 12, 12), task=task, generator=generator)
    assert "no two dense layers" in (Ares().why_not(lenet, SGD, "weights", 4) or "")
    dense = prepare(
        nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 3)), name="d", image_shape=(1, 12, 12), task=task
    )  # fmt: skip
    assert "no convolution" in (Ares().why_not(dense, SGD, "weights", 4) or "")
    normed = convolutional(4, (1, 12, 12), 64, nn.BatchNorm2d(4))
    assert "batch norm" in (Ares().why_not(normed, replace(SGD, batch_norm="train"), "weights", 4) or "")
    assert Ares().why_not(normed, SGD, "weights", 4) is None


def test_batch_norm_in_evaluation_mode_is_made_neutral() -> None:
    found = ares_round(Ares(), convolutional(12, (1, 12, 12), 128, nn.BatchNorm2d(12)), smooth(200, (1, 12, 12)), 6)
    mask = readable(found)
    assert found.recovered(0) >= int(mask.sum()) >= 4


@pytest.mark.skipif(SHARED is None, reason="MEDPFL_DATA names no folder with data")
def test_pneumoniamnist() -> None:
    reader = MedMnistReader(path=Path(SHARED or "", "medmnist", "pneumoniamnist_subset.npz"))
    data = load_dataset(reader, name="pneumonia", size=28, channels=1)
    images = data.images[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:1000]]
    found = ares_round(Ares(), convolutional(4, (1, 28, 28), 256), images, 8)
    mask = readable(found)
    assert count_recovered(found.clients[0][mask], found.result.images) >= int(mask.sum()) - 1 >= 6

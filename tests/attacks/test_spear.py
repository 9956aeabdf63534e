"""SPEAR: whole small batches come back exactly from a dense ReLU layer, or nothing does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medpfl.attacks.sparse_directions import sparse_directions
from medpfl.attacks.spear import Spear
from medpfl.core.domain import Batch, GlobalModel, Observation, Recipe, Reconstruction
from medpfl.core.tasks import SingleLabel
from medpfl.federation.client import client_step
from medpfl.models import prepare


def dense(units: int, shape: tuple[int, ...] = (1, 12, 12)) -> GlobalModel:
    torch.manual_seed(0)
    inputs = int(torch.Size(shape).numel())
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, units), nn.ReLU(), nn.Linear(units, 20), nn.Tanh(), nn.Linear(20, 5)
    )
    return prepare(net, name="dense", image_shape=shape, task=SingleLabel(5))


def observed(model: GlobalModel, images: Tensor, labels: Tensor, precision: str = "float64") -> Observation:
    if precision == "float64":
        model, images = model.to(torch.float64), images.double()
    recipe = Recipe(batch_size=len(images), precision=precision)  # type: ignore[arg-type]
    update, _ = client_step(model, Batch(images, labels), recipe)
    return Observation(model, update, recipe, "honest_server")


def read(observation: Observation, **settings: Any) -> Reconstruction:
    result = Spear(**settings).reconstruct([observation], [torch.Generator().manual_seed(0)])[0]
    assert isinstance(result, Reconstruction), result
    return result


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_small_batches_come_back_with_their_labels(precision: str, smooth: bool, count: int, blobs: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    images = blobs(count, (1, 12, 12)) if smooth else torch.rand((count, 1, 12, 12), generator=generator)
    labels = torch.randint(5, (count,), generator=generator)
    result = read(observed(dense(200), images, labels, precision))
    distances = torch.cdist(result.images.flatten(1).double(), images.flatten(1).double())
    errors, which = distances.min(dim=1)
    assert float(errors.max()) < (1e-8 if precision == "float64" else 1e-3)
    assert sorted(which.tolist()) == list(range(count))
    assert result.labels is not None
    assert torch.equal(result.labels, labels[which])
    assert result.objective < 0.01


def test_the_directions_are_the_columns_of_the_pre_activation_gradients() -> None:
    generator = torch.Generator().manual_seed(3)
    columns = torch.randn((60, 5), generator=generator, dtype=torch.float64)
    columns[torch.rand((60, 5), generator=generator) < 0.5] = 0.0
    left = torch.linalg.qr(columns @ torch.randn((5, 5), generator=generator, dtype=torch.float64)).Q
    directions, draws = sparse_directions(left, 20_000, 1e-7, generator, lambda _: 1.0, 1.0)
    parts = left @ directions.T
    cosines = (parts / parts.norm(dim=0)).T @ (columns / columns.norm(dim=0))
    assert directions.shape == (5, 5)
    assert draws <= 20_000
    torch.testing.assert_close(cosines.abs().amax(dim=0), torch.ones(5).double())


def test_two_layers_with_few_classes_have_sparse_mixtures_that_the_check_sorts_out(blobs: Any) -> None:
    """All units in which three images are active have one linear relation, because three classes' errors sum to zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 120), nn.ReLU(), nn.Linear(120, 3))
    model = prepare(net, name="two", image_shape=(1, 12, 12), task=SingleLabel(3))
    images = blobs(5, (1, 12, 12))
    result = read(observed(model, images, torch.tensor([0, 2, 2, 1, 0])))
    assert float(torch.cdist(images.flatten(1).double(), result.images.flatten(1)).min(dim=1).values.max()) < 1e-8


def test_equal_images_are_one_direction_each(blobs: Any) -> None:
    images = blobs(4, (1, 12, 12))
    images[3] = images[0]
    result = read(observed(dense(200), images, torch.tensor([0, 1, 2, 0])))
    assert len(result.images) == 3
    assert float(torch.cdist(result.images.flatten(1), images.flatten(1).double()).min(dim=1).values.max()) < 1e-8


def test_too_few_draws_and_noise_give_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand((12, 1, 12, 12), generator=generator), torch.randint(5, (12,), generator=generator)
    observation = observed(dense(150), images, labels)
    few = read(observation, draws=10)
    assert len(few.images) == 0
    assert "10 draws showed" in few.stop_reason
    noisy = {name: one + 1e-3 * torch.randn_like(one) for name, one in observation.update.trainable.items()}
    hidden = read(replace(observation, update=replace(observation.update, trainable=noisy)))
    assert len(hidden.images) == 0
    assert "so it was changed" in hidden.stop_reason


def test_what_has_no_sparse_directions_is_refused(make_model: Any, dense_net: Any, sigmoid_lenet: Any) -> None:
    batch = Recipe(batch_size=4)
    assert "no dense layer" in str(
        Spear().why_not(make_model(sigmoid_lenet(), (1, 12, 12)), batch, "gradient", batch.private_images)
    )
    assert "needs ReLU" in str(
        Spear().why_not(make_model(dense_net(64, 9), (1, 8, 8)), batch, "gradient", batch.private_images)
    )
    kinked = make_model(dense_net(64, 9, activation=nn.ReLU()), (1, 8, 8))
    assert Spear().why_not(kinked, batch, "gradient", batch.private_images) is None
    assert "no own directions" in str(Spear().why_not(kinked, Recipe(batch_size=10), "gradient", 10))
    assert "2 local steps" in str(Spear().why_not(kinked, Recipe(update="delta", local_steps=2), "delta", 2))

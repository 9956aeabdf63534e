"""Peeling: which images of a batch come back is predicted by who is active where, and nothing false is certified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medpfl.attacks.peeling import Peeling
from medpfl.core.domain import Batch, Failure, GlobalModel, Observation, Recipe, Reconstruction
from medpfl.core.tasks import SingleLabel
from medpfl.federation.client import client_step
from medpfl.models import Normalization, prepare

Observe = Callable[..., Observation]


def dense(
    units: int, *, deep: bool = False, shape: tuple[int, ...] = (1, 12, 12), normalize: Any = None
) -> GlobalModel:
    """Dense layers with ReLU, initialized as PyTorch does, in float32."""
    torch.manual_seed(0)
    inputs = int(torch.Size(shape).numel())
    rest = [nn.Linear(units, 20), nn.Tanh(), nn.Linear(20, 5)] if deep else [nn.Linear(units, 5)]
    net = nn.Sequential(nn.Flatten(), nn.Linear(inputs, units), nn.ReLU(), *rest)
    return prepare(net, name="dense", image_shape=shape, task=SingleLabel(5), normalize=normalize)


def observed(model: GlobalModel, images: Tensor, labels: Tensor, precision: str = "float64") -> Observation:
    if precision == "float64":
        model, images = model.to(torch.float64), images.double()
    recipe = Recipe(batch_size=len(images), precision=precision)  # type: ignore[arg-type]
    update, _ = client_step(model, Batch(images, labels), recipe)
    return Observation(model, update, recipe, "honest_server")


def peel(observation: Observation, **settings: Any) -> Reconstruction:
    result = Peeling(**settings).reconstruct([observation], [torch.Generator()])[0]
    assert isinstance(result, Reconstruction), result
    return result


def matched(result: Reconstruction, images: Tensor, labels: Tensor, tolerance: float) -> set[int]:
    """Indices of the images that came back; fails if something came back that is none of them, or a wrong label."""
    errors, which = (
        torch.cdist(result.images.flatten(1).double(), images.flatten(1).double()) / images[0].numel() ** 0.5
    ).min(1)
    assert result.labels is not None
    assert float(errors.max()) < tolerance
    assert torch.equal(labels[which], result.labels)
    return set(which.tolist())


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
def test_whole_batches_come_back_with_their_labels(precision: str, deep: bool, smooth: bool, blobs: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    images = blobs(24, (1, 12, 12)) if smooth else torch.rand((24, 1, 12, 12), generator=generator)
    labels = torch.randint(5, (24,), generator=generator)
    result = peel(observed(dense(400, deep=deep), images, labels, precision))
    assert matched(result, images, labels, 1e-3) == set(range(24))
    assert result.stop_reason == "all images certified"
    assert result.gradient_evaluations == 0


def peelable(active: Tensor) -> set[int]:
    """Replays the removal of singletons on who is active where: bool (units, images)."""
    left = active.clone()
    found: set[int] = set()
    while True:
        single = left[left.sum(dim=1) == 1]
        new = {int(row.nonzero()) for row in single}
        if not new:
            return found
        found |= new
        left[:, sorted(new)] = False


@pytest.mark.parametrize("seed", [3, 4, 5, 6])
def test_which_images_come_back_follows_from_who_is_active_where(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.rand((12, 1, 12, 12), generator=generator), torch.randint(5, (12,), generator=generator)
    model = dense(26)
    with torch.no_grad():
        heights = images.flatten(1) @ model.parameters["1.weight"].T
        counts = torch.randint(1, 7, (26,), generator=generator)
        ordered = heights.sort(dim=0, descending=True).values.T
        middle = 0.5 * (ordered.gather(1, counts[:, None] - 1) + ordered.gather(1, counts[:, None]))[:, 0]
        model.parameters["1.bias"].copy_(-middle)
        active = (heights - middle).T > 0
    expected = peelable(active)
    assert 0 < len(expected) <= 12
    assert matched(peel(observed(model, images, labels)), images, labels, 1e-6) == expected


def test_the_replay_leaves_images_out_somewhere() -> None:
    assert peelable(torch.tensor([[True, True, False], [False, True, True], [True, False, True]])) == set()
    assert peelable(torch.tensor([[True, True, False], [False, True, True], [False, False, True]])) == {0, 1, 2}


def test_equal_images_are_counted(blobs: Any) -> None:
    images = blobs(6, (1, 12, 12))
    images[3] = images[1]
    images[5] = images[1]
    labels = torch.tensor([0, 2, 4, 2, 1, 2])
    result = peel(observed(dense(300), images, labels))
    assert len(result.images) == 6
    assert result.labels is not None
    assert sorted(result.labels.tolist()) == [0, 1, 2, 2, 2, 4]


def test_normalization_in_front_is_undone() -> None:
    normalize = Normalization(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    images, labels = torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4])
    result = peel(observed(dense(200, shape=(3, 8, 8), normalize=normalize), images, labels))
    assert matched(result, images, labels, 1e-6) == set(range(5))


def test_one_sgd_step_is_a_gradient() -> None:
    model = dense(200).to(torch.float64)
    images, labels = torch.rand(5, 1, 12, 12).double(), torch.tensor([0, 1, 2, 3, 4])
    recipe = Recipe(update="weights", batch_size=5, learning_rate=0.1, precision="float64")
    update, _ = client_step(model, Batch(images, labels), recipe)
    assert matched(peel(Observation(model, update, recipe, "honest_server")), images, labels, 1e-6) == set(range(5))


@pytest.mark.parametrize("scale", [1e-4, 1e-2])
def test_noise_certifies_nothing_false(scale: float) -> None:
    images, labels = torch.rand(8, 1, 12, 12), torch.randint(5, (8,))
    observation = observed(dense(200), images, labels)
    noisy = {name: one + scale * torch.randn_like(one) for name, one in observation.update.trainable.items()}
    result = peel(replace(observation, update=replace(observation.update, trainable=noisy)))
    assert result.images.shape == (0, 1, 12, 12)
    assert "can be certified" in result.stop_reason


def test_what_cannot_be_peeled_is_refused(
    make_model: Any, dense_net: Any, sigmoid_lenet: Any, multi_label: Any, observe: Observe, blobs: Any
) -> None:
    def reason(model: GlobalModel, recipe: Recipe) -> str:
        return str(Peeling().why_not(model, recipe, recipe.update, recipe.private_images))

    batch = Recipe(batch_size=4)
    assert "no dense layer" in reason(make_model(sigmoid_lenet(), (1, 12, 12)), batch)
    smooth = make_model(dense_net(64, 9), (1, 8, 8))
    assert "needs ReLU" in reason(smooth, batch)
    assert Peeling().why_not(smooth, Recipe(), "gradient", 1) is None
    kinked = make_model(dense_net(64, 9, activation=nn.ReLU()), (1, 8, 8))
    assert Peeling().why_not(kinked, batch, "gradient", batch.private_images) is None
    assert "3 local steps" in reason(kinked, Recipe(update="delta", local_steps=3))
    assert "adam" in reason(kinked, Recipe(update="delta", optimizer="adam", epochs=2))
    several = make_model(dense_net(64, 9, activation=nn.ReLU()), (1, 8, 8), task=multi_label(3))
    assert "one class per image" in reason(several, batch)
    observation = observe(kinked, blobs(2, (1, 8, 8)), torch.tensor([0, 1]))
    withheld = replace(observation, recipe=None, update=replace(observation.update, kind="delta"))
    failure = Peeling().reconstruct([withheld], [torch.Generator()])[0]
    assert isinstance(failure, Failure)
    assert "withheld" in failure.reason

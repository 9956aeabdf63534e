"""MedLeak against what can be read at most: the images that are really alone in their bin (truth, for scoring only)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from crafted_rounds import SGD, Round, alone_between, lenet
from crafted_rounds import attacked as attacked_round
from torch import Tensor, nn

from medpfl.attacks.bin_readout import read_bins
from medpfl.attacks.brightness_bins import gaussian_edges, smoothed_edges
from medpfl.attacks.crafted import ServerView
from medpfl.attacks.medleak import MedLeak
from medpfl.core.domain import (
    Auxiliary,
    Batch,
    Failure,
    Knowledge,
    Observation,
    Recipe,
    Reconstruction,
)
from medpfl.core.errors import AttackFailure
from medpfl.core.tasks import Segmentation, SingleLabel, Task
from medpfl.data.dataset import Dataset
from medpfl.federation import Channel, Plain, SecAggPlus, SecureSum, run_round
from medpfl.models import prepare

SHARED = os.environ.get("MEDPFL_DATA")
LOSS = 0.02
"""Share of the images alone in their bin that may get lost."""


def attacked(attack: MedLeak, data: Dataset, size: int, **other: Any) -> Round:
    """A round whose images the attack is after are the victim's only, or all."""
    return attacked_round(attack, data, size, sought=1 if attack.mode == "separate" else None, **other)


def alone(found: Round) -> int:
    """How many of the images that the attack is after are the only ones between two edges."""
    (edges,) = found.broadcast.secret["edges"]
    return alone_between(
        torch.cat([edges, edges.new_tensor([torch.inf])]), found.private.double().flatten(1).mean(dim=1)
    )


CHANNELS: list[Any] = [
    pytest.param("separate", Plain(), id="plain"),
    pytest.param("separate", SecureSum(clients=4), id="secure sum, separate"),
    pytest.param("joint", SecureSum(clients=4), id="secure sum, joint"),
    pytest.param("separate", SecAggPlus(clients=4), id="secagg, separate"),
    pytest.param("joint", SecAggPlus(clients=4), id="secagg, joint"),
]


def check(found: Round) -> None:
    """Nearly all that can be read came back, and no more candidates than images."""
    assert alone(found) >= 10
    assert found.recovered >= (1 - LOSS) * alone(found)
    assert len(found.result.images) <= len(found.private)


@pytest.mark.parametrize(("mode", "channel"), CHANNELS)
@pytest.mark.parametrize("size", [16, 64])
def test_nearly_all_images_alone_in_their_bin_come_back(mode: Any, channel: Channel, size: int, films: Dataset) -> None:
    check(attacked(MedLeak(mode=mode, queries=1), films, size, channel=channel))


@pytest.mark.skipif(SHARED is None, reason="MEDPFL_DATA names no folder with data")
@pytest.mark.parametrize(("mode", "channel"), CHANNELS)
@pytest.mark.parametrize("size", [16, 64])
def test_the_same_on_pneumoniamnist(mode: Any, channel: Channel, size: int, pneumonia: Dataset) -> None:
    check(attacked(MedLeak(mode=mode, queries=1), pneumonia, size, channel=channel))


@pytest.mark.parametrize("kind", ["gradient", "delta", "weights"])
def test_every_kind_of_update_and_colors(kind: Any, skin: Dataset) -> None:
    found = attacked(MedLeak(bins=256, queries=1), skin, 16, recipe=replace(SGD, update=kind))
    check(found)
    assert found.result.images.shape[1:] == (3, 28, 28)


def test_the_published_scale_is_lost_in_rounding_and_the_calibrated_one_is_not(films: Dataset) -> None:
    """The same module, the same round: with a plain client of float32 weights, and behind SecAgg+."""
    channel = SecAggPlus(clients=3)
    published = attacked(MedLeak(scale=1.0, queries=1), films, 32, channel=channel)
    calibrated = attacked(MedLeak(queries=1), films, 32, channel=channel)
    assert published.recovered == 0
    assert calibrated.recovered >= (1 - LOSS) * alone(calibrated) > 20
    assert "calibrated" in calibrated.broadcast.notes[0]


def test_the_scale_changes_no_output_and_the_victims_model_predicts_from_brightness_alone(films: Dataset) -> None:
    views = [
        attacked(MedLeak(scale=scale, queries=1), films, 8, recipe=replace(SGD, update="gradient"))
        for scale in (1.0, 1e-6)
    ]
    images = torch.rand((4, 1, 28, 28), generator=torch.Generator().manual_seed(3))
    first, second = (view.broadcast.model(0).forward(images)[0] for view in views)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    shuffled = images.flatten(1)[:, torch.randperm(784, generator=torch.Generator().manual_seed(4))].reshape(
        images.shape
    )
    torch.testing.assert_close(views[0].broadcast.model(0).forward(shuffled)[0], first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 3])
def test_a_dead_module_gets_no_gradient_whatever_the_images_are(queries: int, films: Dataset) -> None:
    sent = attacked(MedLeak(scale=1e-4, queries=queries), films, 8, channel=SecureSum(clients=2)).broadcast
    images = torch.stack([torch.zeros(1, 28, 28), torch.ones(1, 28, 28), films.images[0]])
    dead = sent.model(1)
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in dead.parameters.items()}
    output, _ = dead.forward(images, parameters=parameters)
    loss = dead.task.loss(output, torch.tensor([0, 1, 0]))
    first, *others = torch.autograd.grad(loss, list(parameters.values()))
    assert not bool(first.any())
    assert any(bool(gradient.any()) for gradient in others)


@pytest.mark.parametrize(
    ("module", "shape", "task"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 10, 3)), (3, 12, 10), SingleLabel(3)),
        (nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 4 * 3, 3)), (1, 7, 6, 5), SingleLabel(3)),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3)), (1, 12, 12), SingleLabel(3)),
        (nn.Conv2d(1, 2, 3, padding=1), (1, 12, 12), Segmentation(2)),
    ],
    ids=["dense, color", "volume", "batch norm in train mode", "segmentation"],
)  # fmt: skip
def test_any_model_takes_the_module(
    module: nn.Module, shape: tuple[int, ...], task: Task, blobs: Callable[..., Tensor]
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
                layer.reset_parameters()
    model = prepare(module, name="own", image_shape=shape, task=task)
    images, generator = blobs(200, shape), torch.Generator().manual_seed(0)
    targets = torch.randint(task.classes, (200,), generator=generator)
    if isinstance(task, Segmentation):
        targets = torch.randint(task.classes, (200, *shape[1:]), generator=generator)
    recipe = Recipe(update="delta", batch_size=8, learning_rate=0.1, batch_norm="train")
    attack = MedLeak(bins=128, queries=1)
    assert attack.why_not(model, recipe, "delta", 8) is None
    knowledge = Knowledge(auxiliary=Auxiliary(images[8:], targets[8:]))
    view = ServerView(model, recipe, "delta", Plain(), 8, "malicious_server", attack.needs(), knowledge)
    broadcast = attack.prepare(view, generator)
    clients = [(Batch(images[:8], targets[:8]), generator)]
    update = run_round(broadcast, clients, recipe, generator=generator)
    observation = Observation(broadcast.model(0), update, recipe, "malicious_server", broadcast=broadcast)
    (result,) = attack.reconstruct([observation], [generator])
    assert isinstance(result, Reconstruction)
    found = Round(images[:8], broadcast, observation, result)
    assert found.recovered >= alone(found) >= 4


@pytest.mark.parametrize("channel", [Plain(), SecAggPlus(clients=2)], ids=["plain", "secagg"])
def test_a_dozen_images_of_its_own_are_enough_to_find_the_sizes(channel: Channel, films: Dataset) -> None:
    """A batch holds more images than the server owns, which plays rounds with mixtures of them."""
    few = replace(films, images=films.images[: 12 + 32 * channel.client_count])
    few = replace(few, targets=films.targets[: len(few.images)])
    found = attacked(MedLeak(queries=1), few, 32, channel=channel)
    assert found.recovered >= (1 - LOSS) * alone(found) >= 20


def test_smoothed_bins_hold_equal_shares_of_images_that_were_not_seen(films: Dataset) -> None:
    """Half of the phantoms are the attacker's; the share alone among the others is near its closed form."""
    means = films.images.double().flatten(1).mean(dim=1)
    edges = smoothed_edges(means[::2], 128)
    assert bool((edges.diff() > 0).all())
    counts = torch.histogram(means[1::2], torch.cat([edges, torch.tensor([2.0], dtype=torch.float64)])).hist
    expected = len(means[1::2]) / 128
    assert float(counts[0]) < 6 * expected
    singles = []
    for part in torch.split(means[1::2], 32)[:-1]:
        held = torch.bincount(torch.searchsorted(edges, part) - 1, minlength=128)
        singles.append(int((held == 1).sum()) / len(part))
    assert sum(singles) / len(singles) == pytest.approx((1 - 1 / 128) ** 31, abs=0.05)


def test_gaussian_bins_are_the_published_quantiles() -> None:
    values = torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64)
    edges = gaussian_edges(values, 3)
    assert edges.tolist() == pytest.approx([0.4 - 3.0902 * 0.2, 0.4, 0.4 + 3.0902 * 0.2], abs=1e-4)


def test_the_read_out_keeps_images_and_drops_what_cannot_be_one() -> None:
    edges = torch.tensor([-0.05, 0.2, 0.4, 0.6], dtype=torch.float64)
    dark, bright = torch.full((4,), 0.1).double(), torch.tensor([0.5, 0.9, 0.9, 0.9]).double()
    wrong = torch.tensor([3.0, -2.0, 0.4, 0.0]).double()  # its mean lies in its bin, its pixels do not in [0, 1]
    steps = torch.tensor([2.0, 1e-9, 0.5, -1.0]).double()
    inputs = torch.stack([dark, torch.full((4,), 0.3).double(), wrong * 1.4, bright])
    bias = steps.flip(0).cumsum(0).flip(0)
    weight = (steps[:, None] * inputs).flip(0).cumsum(0).flip(0)
    found = read_bins(weight, bias, edges, (1, 2, 2), 4, floor=1e-6)
    assert found.bins.tolist() == [0, 3]
    torch.testing.assert_close(found.images.flatten(1).double(), torch.stack([dark, bright]), rtol=1e-6, atol=1e-7)
    assert read_bins(weight, bias, edges, (1, 2, 2), 1, floor=1e-6).bins.tolist() == [0]
    assert 1 in read_bins(weight, bias, edges, (1, 2, 2), 4).bins.tolist()


def test_what_it_cannot_do_is_refused_with_the_reason(films: Dataset) -> None:
    model = lenet(films, 0)
    assert "recipe is withheld" in (MedLeak().why_not(model, None, "weights", 1) or "")
    assert MedLeak(scale=1e-4).why_not(model, None, "weights", 1) is None
    assert "GiB" in (MedLeak(bins=10**9).why_not(model, SGD, "weights", 1) or "")
    assert "inconsistent_models" in MedLeak().needs()
    assert "inconsistent_models" not in MedLeak(mode="joint").needs()
    view = ServerView(model, SGD, "weights", Plain(), 1, "malicious_server", frozenset())
    with pytest.raises(AttackFailure, match="auxiliary"):
        MedLeak().prepare(view, torch.Generator())


def test_updates_that_show_nothing_or_break(films: Dataset) -> None:
    found = attacked(MedLeak(scale=1e-3, queries=1), films, 8)
    sent = found.observation.model.parameters
    silent = replace(found.observation.update, trainable=dict(sent))
    broken = replace(silent, trainable={name: torch.full_like(tensor, torch.nan) for name, tensor in sent.items()})
    updates = [replace(found.observation, update=update) for update in (silent, broken)]
    nothing, failure = MedLeak().reconstruct(updates, [torch.Generator()] * 2)
    assert isinstance(nothing, Reconstruction)
    assert len(nothing.images) == 0
    assert isinstance(failure, Failure)
    assert "finite" in failure.reason

"""Unrolling a client's local training: orders, the order-invariant prior, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from medpfl.attacks.fedavg_inversion import FedAvgInversion
from medpfl.attacks.gradinv import GradInv
from medpfl.attacks.matching.epochs import epoch_orders, merged, same_images, spread
from medpfl.attacks.matching.gradients import Layout, matching_objective
from medpfl.attacks.matching.objectives import falling_weights, squared_distance
from medpfl.attacks.matching.priors import no_prior, outside
from medpfl.attacks.matching.problem import build_problem
from medpfl.core.domain import Batch, GlobalModel, Observation, Recipe, Reconstruction
from medpfl.federation.client import client_step

Observed = Callable[..., Observation]
LABELS = torch.tensor([0, 1, 2, 0])
CLIENTS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"optimizer": "adam", "learning_rate": 0.001},
    {"optimizer": "adamw", "learning_rate": 0.001, "weight_decay": 0.1},
]


@pytest.fixture
def net(make_model: Any, dense_net: Any) -> GlobalModel:
    model: GlobalModel = make_model(dense_net(64, 16), (1, 8, 8), double=True)
    return model


def train(model: GlobalModel, images: Tensor, recipe: Recipe) -> tuple[Observation, list[Tensor]]:
    """What a shuffling client sends, and the orders that it took, which nobody sees."""
    update, _ = client_step(model, Batch(images, LABELS), recipe, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(len(images), generator=generator) for _ in range(recipe.epochs)]
    return Observation(model, update, recipe, "honest_server"), orders


@pytest.mark.parametrize("client", CLIENTS, ids=str)
def test_true_images_in_true_order_explain_the_update(client: dict[str, Any], net: GlobalModel, blobs: Any) -> None:
    images = blobs(4, (1, 8, 8)).double()
    recipe = Recipe(
        **{
            "update": "delta",
            "batch_size": 2,
            "local_steps": 2,
            "epochs": 3,
            "shuffle": True,
            "learning_rate": 0.1,
            "precision": "float64",
            **client,
        }
    )
    seen, orders = train(net, images, recipe)
    problem = build_problem([seen], "float64", separate_epochs=True)
    layout = Layout((12, 1, 8, 8))
    labels = torch.cat([LABELS[order] for order in orders])
    objective = matching_objective(
        problem,
        layout,
        labels[None],
        distance=squared_distance,
        weights=torch.ones(1, len(problem.names), dtype=torch.float64),
        prior=same_images(1.0, 3, "mean", "pixels"),
    )
    true = torch.cat([images[order] for order in orders]).reshape(1, -1)
    in_order = images.repeat(3, 1, 1, 1).reshape(1, -1)
    value, derivative = objective(torch.cat([true, in_order]), torch.tensor([0, 0]))
    size = float(problem.squared_norms(torch.ones(1, len(problem.names), dtype=torch.float64)))
    assert float(value[0]) < 1e-18 * size
    assert float(value[1]) > 1e-9 * size
    assert float(derivative[0].abs().max()) < 1e-8 * float(derivative[1].abs().max())


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("features", ["pixels", "convolution"])
@pytest.mark.parametrize("shape", [(1, 6, 5), (3, 4, 5, 6)], ids=["images", "volumes"])
def test_the_prior_does_not_see_orders_but_sees_other_images(
    pooling: Any, features: Any, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((4, *shape), generator=generator, dtype=torch.float64)
    prior = same_images(2.0, 3, pooling, features)
    shuffled = [images[torch.randperm(4, generator=generator)] for _ in range(3)]
    assert float(prior(torch.cat(shuffled))) < 1e-20
    other = torch.cat([*shuffled[:2], torch.rand((4, *shape), generator=generator, dtype=torch.float64)])
    assert float(prior(other)) > 1e-4


def test_the_prior_is_the_mean_over_pairs_of_epochs() -> None:
    images = torch.tensor([0.0, 1.0, 0.5, 0.7]).reshape(4, 1, 1, 1)
    expected = 2.0 * 2 * (0.5 - 0.6) ** 2 / 4
    assert float(same_images(2.0, 2, "mean", "pixels")(images)) == pytest.approx(expected)
    assert same_images(0.0, 2, "mean", "pixels") is no_prior
    assert same_images(1.0, 1, "mean", "pixels") is no_prior


def test_epochs_are_paired_within_labels_and_averaged() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 1, 3, 3, generator=generator)
    noisy = images + 0.01 * torch.randn(images.shape, generator=generator)
    labels = torch.tensor([0, 0, 1, 1])
    for order in permutations(range(2)):
        places = torch.tensor([*order, 2, 3])
        found = merged(torch.cat([images, noisy[places]]), torch.cat([labels, labels]), 2)
        torch.testing.assert_close(found, (images + noisy) / 2)
    crossed = torch.cat([images, images[[2, 3, 0, 1]]])
    apart = merged(crossed, torch.cat([labels, labels]), 2)
    assert not torch.allclose(apart, images)
    torch.testing.assert_close(merged(crossed, None, 2), images)


def test_spread_labels_are_the_same_ones_and_even() -> None:
    for counts in ([4, 4], [6, 2], [1, 0, 7], [3, 3, 2]):
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        found = spread(labels)
        assert found.sort().values.tolist() == labels.tolist()
        for kind, count in enumerate(counts):
            first = int((found[:4] == kind).sum())
            assert abs(first - count / 2) <= 1


def test_one_step_is_plain_matching(net: GlobalModel, observe: Observed, blobs: Any) -> None:
    """A client of one step is the gradient of the same images, whatever the attack supposes about orders."""
    images = blobs(4, (1, 8, 8)).double()
    gradient = observe(net, images, LABELS)
    recipe = Recipe(update="delta", batch_size=4, learning_rate=0.1, precision="float64", shuffle=True)
    stepped, _ = train(net, images, recipe)
    results = []
    for seen in (gradient, stepped):
        for order in ("separate", "known"):
            attack = FedAvgInversion(iterations=60, order=order, precision="float64")
            (result,) = attack.reconstruct([seen], [torch.Generator().manual_seed(0)])
            assert isinstance(result, Reconstruction), result
            results.append(result)
    for result in results[1:]:
        torch.testing.assert_close(result.images, results[0].images, atol=1e-6, rtol=0)
        assert result.objective == pytest.approx(results[0].objective, rel=1e-6)


@pytest.mark.parametrize("order", ["separate", "known"])
def test_as_many_images_come_back_as_the_client_holds(order: Any, net: GlobalModel, blobs: Any) -> None:
    recipe = Recipe(update="weights", batch_size=2, local_steps=2, epochs=2, images=3, shuffle=True, momentum=0.5)
    update, _ = client_step(net, Batch(blobs(3, (1, 8, 8)), LABELS[:3]), recipe, generator=torch.Generator())
    seen = Observation(net, update, recipe, "honest_server")
    attack = FedAvgInversion(iterations=20, order=order)
    (result,) = attack.reconstruct([seen], [torch.Generator().manual_seed(0)])
    assert isinstance(result, Reconstruction), result
    assert result.images.shape == (3, 1, 8, 8)
    assert result.labels is not None
    assert len(result.labels) == 3
    assert result.gradient_evaluations == 21 * 4
    said = "left open" if order == "separate" else "the client shuffles"
    assert any(said in note for note in result.notes)


def test_other_attacks_say_what_they_suppose_about_a_shuffling_client(net: GlobalModel, blobs: Any) -> None:
    recipe = Recipe(update="delta", batch_size=2, local_steps=2, epochs=2, shuffle=True)
    seen, _ = train(net, blobs(4, (1, 8, 8)), recipe)
    (result,) = GradInv(iterations=3).reconstruct([seen], [torch.Generator().manual_seed(0)])
    assert isinstance(result, Reconstruction), result
    assert any("the client shuffles" in note for note in result.notes)


def test_weights_fall_from_layer_to_layer() -> None:
    weights = falling_weights(["a.weight", "a.bias", "b.0.weight", "c.weight", "c.bias"], 0.5)
    assert weights.tolist() == [1.0, 1.0, 0.5, 0.25, 0.25]


def test_the_clip_term_has_no_opinion_inside() -> None:
    assert float(outside(3.0)(torch.rand(2, 1, 4, 4))) == 0.0
    assert float(outside(3.0)(torch.full((2, 1, 4, 4), -2.0))) == pytest.approx(12.0)


def test_epochs_take_the_same_variables_or_their_own() -> None:
    assert [order.tolist() for order in epoch_orders(2, 3, 1)] == [[0, 1]] * 3
    assert [order.tolist() for order in epoch_orders(2, 3, 3)] == [[0, 1], [2, 3], [4, 5]]

"""The closed forms: what they give back exactly, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medpfl.attacks.feature_readout import FeatureReadout
from medpfl.attacks.first_layer_readout import FirstLayerReadout
from medpfl.attacks.layers import DenseLayer, last_dense, layer_input
from medpfl.attacks.peeling import Peeling
from medpfl.core.domain import Batch, Observation, Recipe, Reconstruction
from medpfl.core.tasks import SingleLabel
from medpfl.federation.client import client_step
from medpfl.models import Normalization, prepare

Observe = Callable[..., Observation]


def only(results: list[Any]) -> Reconstruction:
    assert len(results) == 1
    assert isinstance(results[0], Reconstruction), results[0]
    return results[0]


def read(observation: Observation) -> Reconstruction:
    return only(FirstLayerReadout().reconstruct([observation], [torch.Generator()]))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 9), (1, 4, 5, 6)])
def test_one_image_of_a_dense_net_is_exact(shape: tuple[int, ...], make_model: Any, observe: Observe) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(int(torch.tensor(shape).prod()), 30), nn.ReLU(), nn.Linear(30, 4))
    model = make_model(net, shape, 4, double=True)
    images = torch.rand(1, *shape, dtype=torch.float64)
    result = read(observe(model, images, torch.tensor([3])))
    assert float((result.images - images).abs().max()) < 1e-10
    assert result.labels is not None
    assert result.labels.tolist() == [3]
    assert result.gradient_evaluations == 0


def test_normalization_in_front_is_undone(observe: Observe) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 20), nn.ReLU(), nn.Linear(20, 3))
    normalize = Normalization(mean=(0.48, 0.45, 0.4), std=(0.2, 0.25, 0.3))
    model = prepare(net, name="x", image_shape=(3, 8, 8), task=SingleLabel(3), normalize=normalize).to(torch.float64)
    images = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    result = read(observe(model, images, torch.tensor([0])))
    assert float((result.images - images).abs().max()) < 1e-10


def test_noise_is_averaged_over_all_units(make_model: Any, dense_net: Any, observe: Observe) -> None:
    model = make_model(dense_net(64, 200), (1, 8, 8), double=True)
    images = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    observation = observe(model, images, torch.tensor([1]))
    noisy = {name: one + 1e-3 * torch.randn_like(one) for name, one in observation.update.trainable.items()}
    result = read(replace(observation, update=replace(observation.update, trainable=noisy)))
    bias, weight = noisy["1.bias"], noisy["1.weight"]
    unit = int(bias.abs().argmax())
    best_unit = (weight[unit] / bias[unit]).reshape(images.shape)
    assert float((result.images - images).square().mean()) < 0.5 * float((best_unit - images).square().mean())


def test_single_images_of_a_batch_are_found(make_model: Any, observe: Observe) -> None:
    """Units with one active image each: rows point at that image, biases keep the others below zero."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 1, 8, 8, generator=generator, dtype=torch.float64)
    flat = images.flatten(1)
    rows, biases = [], []
    for index in range(4):
        for _ in range(5):
            row = flat[index] - flat.mean(dim=0) + 0.05 * torch.randn(64, generator=generator, dtype=torch.float64)
            heights = flat @ row
            others = heights[torch.arange(4) != index].max()
            rows.append(row)
            biases.append(-(0.5 * heights[index] + 0.5 * others))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 3))
    model = make_model(net, (1, 8, 8), double=True)
    with torch.no_grad():
        model.parameters["1.weight"][:20] = torch.stack(rows)
        model.parameters["1.bias"][:20] = torch.stack(biases)
    result = read(observe(model, images, torch.tensor([0, 1, 2, 0])))
    assert len(result.images) == 4
    errors = torch.cdist(result.images.flatten(1), flat).amin(dim=0)
    assert float(errors.max()) < 1e-8


def test_no_active_unit_gives_nothing_and_is_no_breakdown(
    make_model: Any, dense_net: Any, observe: Observe, blobs: Any
) -> None:
    model = make_model(dense_net(64, 9, activation=nn.ReLU()), (1, 8, 8))
    with torch.no_grad():
        model.parameters["1.bias"].fill_(-1000.0)
    result = read(observe(model, blobs(2, (1, 8, 8)), torch.tensor([0, 1])))
    assert result.images.shape == (0, 1, 8, 8)
    assert "no unit of '1' was active" in result.stop_reason


@pytest.mark.parametrize(("bias", "why"), [(0.0, "makes no error"), (0.2, "no class of the batch")])
def test_a_last_layer_that_shows_no_class_gives_nothing(
    bias: float, why: str, make_model: Any, dense_net: Any, observe: Observe, blobs: Any, multi_label: Any
) -> None:
    model = make_model(dense_net(64, 9), (1, 8, 8), task=multi_label(3))
    observation = observe(model, blobs(2, (1, 8, 8)), torch.zeros(2, 3))
    trainable = dict(observation.update.trainable)
    trainable["3.bias"] = torch.full_like(trainable["3.bias"], bias)
    observation = replace(observation, update=replace(observation.update, trainable=trainable))
    result = only(FeatureReadout(iterations=5).reconstruct([observation], [torch.Generator()]))
    assert result.images.shape == (0, 1, 8, 8)
    assert why in result.stop_reason


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3)), "no dense layer"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 9, bias=False), nn.Linear(9, 3)), "no bias"),
        (nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)), "16 inputs for 64 pixels"),
        (nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(64, 3)), "does not see the pixels"),
        (nn.Sequential(nn.Linear(8, 8), nn.Flatten(), nn.Linear(64, 3)), "one vector per image"),
    ],
)
def test_first_layers_that_hide_the_image_are_refused(net: nn.Module, reason: str, make_model: Any) -> None:
    found = FirstLayerReadout().why_not(make_model(net, (1, 8, 8)), Recipe(), "gradient", 1)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize("attack", [FirstLayerReadout(), FeatureReadout()])
def test_several_steps_of_adam_are_refused(attack: Any, make_model: Any, dense_net: Any) -> None:
    model = make_model(dense_net(64, 9), (1, 8, 8))
    assert "adam" in attack.why_not(model, Recipe(update="delta", optimizer="adam", local_steps=3), "delta", 3)
    assert attack.why_not(model, Recipe(update="delta", optimizer="adam"), "delta", 1) is None
    assert attack.why_not(model, Recipe(update="delta", local_steps=3), "delta", 3) is None
    assert attack.why_not(model, None, "delta", 3) is None


def many_features(make_model: Any, double: bool = True) -> Any:
    net = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(12 * 64, 4))
    return make_model(net, (1, 8, 8), 4, double=double)


def test_many_features_determine_the_image(make_model: Any, observe: Observe, blobs: Any) -> None:
    images = blobs(3, (1, 8, 8)).double()
    model = many_features(make_model)
    observations = [observe(model, images[row : row + 1], torch.tensor([row])) for row in range(3)]
    results = FeatureReadout(iterations=300).reconstruct(
        observations, [torch.Generator().manual_seed(row) for row in range(3)]
    )
    for row, result in enumerate(results):
        assert isinstance(result, Reconstruction)
        assert float((result.images - images[row]).abs().max()) < 1e-3
        assert result.labels is not None
        assert result.labels.tolist() == [row]
        assert "solved" in result.stop_reason


def test_features_of_a_batch_give_one_image_per_class(make_model: Any, observe: Observe, blobs: Any) -> None:
    model = many_features(make_model)
    observation = observe(model, blobs(3, (1, 8, 8)).double(), torch.tensor([0, 2, 2]))
    result = only(FeatureReadout(iterations=100).reconstruct([observation], [torch.Generator().manual_seed(0)]))
    assert len(result.images) == 2


def test_the_last_layer_is_found_by_name_and_its_input_captured(make_model: Any) -> None:
    model = many_features(make_model)
    layer = last_dense(model)
    assert layer == DenseLayer("3", "3.weight", "3.bias")
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    seen = layer_input(model, layer, images)
    parameters = model.parameters
    expected = torch.nn.functional.conv2d(images, parameters["0.weight"], parameters["0.bias"], padding=1).sigmoid()
    torch.testing.assert_close(seen, expected.flatten(1))

    def total(images: Tensor) -> Tensor:
        return layer_input(model, layer, images).sum()

    assert float(torch.func.grad(total)(images).abs().max()) > 0


@pytest.mark.parametrize("update", ["delta", "weights"])
def test_one_step_of_adam_is_undone_and_units_whose_size_it_hides_are_not_read(
    update: Any, make_model: Any, dense_net: Any, blobs: Any
) -> None:
    """With an epsilon of the gradient's size it hides nothing; with the usual one a float32 step shows signs only."""
    model, image = make_model(dense_net(64, 9), (1, 8, 8)), blobs(1, (1, 8, 8))
    for epsilon, readable in ((1e-2, True), (1e-12, False)):
        recipe = Recipe(update=update, optimizer="adam", learning_rate=0.01, epsilon=epsilon)
        sent, _ = client_step(model, Batch(image, torch.tensor([1])), recipe)
        observation = Observation(model, sent, recipe, "honest_server")
        for attack in (FirstLayerReadout(), Peeling()):
            (result,) = attack.reconstruct([observation], [torch.Generator()])
            assert isinstance(result, Reconstruction)
            if readable:
                assert float((result.images - image).abs().max()) < 1e-2
            else:
                assert not len(result.images)
                assert "hides the gradient's size" in result.stop_reason

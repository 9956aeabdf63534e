"""Label inference against the labels that made the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from medpfl.attacks.label_counts import Moment, estimate_counts, round_to_sum
from medpfl.attacks.labels import infer_labels, why_no_labels
from medpfl.attacks.updates import gradient_view
from medpfl.core.domain import Batch, Observation, Recipe
from medpfl.federation.client import client_step

Observe = Callable[..., Observation]


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform-weights", "default-weights"])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_one_image_on_random_lenets_is_always_right(
    uniform: bool, classes: int, make_model: Any, sigmoid_lenet: Any, observe: Observe
) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        model = make_model(sigmoid_lenet(classes=classes), (1, 12, 12), classes, seed=seed, uniform=uniform)
        label = torch.tensor([seed % classes])
        inference = infer_labels(observe(model, torch.rand(1, 1, 12, 12), label))
        assert inference.labels is not None
        assert inference.labels.tolist() == label.tolist()
        assert inference.confidence == 1.0


def test_a_head_without_bias_is_read_from_its_rows(make_model: Any, observe: Observe) -> None:
    for seed in range(10):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 4, bias=False))
        model = make_model(net, (1, 8, 8), 4, seed=seed)
        label = torch.tensor([seed % 4])
        inference = infer_labels(observe(model, torch.rand(1, 1, 8, 8), label))
        assert inference.labels is not None
        assert inference.labels.tolist() == label.tolist()


@pytest.mark.parametrize("kind", ["delta", "weights"])
def test_updates_of_one_step(kind: str, make_model: Any, dense_net: Any, observe: Observe, as_kind: Any) -> None:
    for label in range(3):
        observation = observe(make_model(dense_net(64, 20), (1, 8, 8)), torch.rand(1, 1, 8, 8), torch.tensor([label]))
        inference = infer_labels(as_kind(observation, kind, 0.05))
        assert inference.labels is not None
        assert inference.labels.tolist() == [label]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_several_local_steps_on_one_image(optimizer: str, make_model: Any, dense_net: Any) -> None:
    recipe = Recipe(update="delta", epochs=3, optimizer=optimizer, learning_rate=0.01)  # type: ignore[arg-type]
    model = make_model(dense_net(64, 20), (1, 8, 8))
    for label in range(3):
        update, _ = client_step(model, Batch(torch.rand(1, 1, 8, 8), torch.tensor([label])), recipe)
        inference = infer_labels(Observation(model, update, recipe, "honest_server"))
        assert inference.labels is not None
        assert inference.labels.tolist() == [label]


def test_noise_lowers_confidence_not_honesty(make_model: Any, sigmoid_lenet: Any, observe: Observe) -> None:
    right, noted = 0, 0
    for seed in range(20):
        model = make_model(sigmoid_lenet(), (1, 12, 12), seed=seed, uniform=False)
        observation = observe(model, torch.rand(1, 1, 12, 12), torch.tensor([seed % 3]))
        generator = torch.Generator().manual_seed(seed)
        noisy = {
            name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in observation.update.trainable.items()
        }
        inference = infer_labels(replace(observation, update=replace(observation.update, trainable=noisy)))
        assert inference.labels is not None
        right += inference.labels.tolist() == [seed % 3]
        noted += any("noise" in note for note in inference.notes)
    assert right == 20
    assert noted >= 18


def test_an_undecided_gradient_is_called_ambiguous(make_model: Any, dense_net: Any, observe: Observe) -> None:
    observation = observe(make_model(dense_net(64, 20), (1, 8, 8)), torch.rand(1, 1, 8, 8), torch.tensor([0]))
    even = dict(observation.update.trainable)
    even["3.bias"] = torch.tensor([-0.5, -0.499, 0.999])
    inference = infer_labels(replace(observation, update=replace(observation.update, trainable=even)))
    assert inference.confidence < 0.1
    assert any("ambiguous" in note for note in inference.notes)


def test_a_model_that_is_sure_of_the_label_is_noticed(make_model: Any, dense_net: Any, observe: Observe) -> None:
    model = make_model(dense_net(64, 20), (1, 8, 8))
    model.parameters["3.bias"][2] = 40.0
    inference = infer_labels(observe(model, torch.rand(1, 1, 8, 8), torch.tensor([2])))
    assert inference.labels is not None
    assert inference.labels.tolist() == [2]
    assert any("so sure of the label" in note for note in inference.notes)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_counts_of_small_batches_on_untrained_nets(
    count: int, make_model: Any, sigmoid_lenet: Any, observe: Observe
) -> None:
    exact = 0
    for seed in range(10):
        torch.manual_seed(seed)
        model = make_model(sigmoid_lenet(classes=4), (1, 12, 12), 4, uniform=False)
        labels = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(seed))
        inference = infer_labels(observe(model, torch.rand(count, 1, 12, 12), labels))
        assert inference.labels is not None
        assert len(inference.labels) == count
        exact += torch.equal(inference.labels, labels.sort().values)
    assert exact >= 9


def test_independent_classes_of_one_image(make_model: Any, dense_net: Any, observe: Observe, multi_label: Any) -> None:
    for seed in range(5):
        model = make_model(dense_net(64, 20, 5), (1, 8, 8), task=multi_label(5), seed=seed)
        labels = (torch.rand(1, 5, generator=torch.Generator().manual_seed(seed)) > 0.5).float()
        inference = infer_labels(observe(model, torch.rand(1, 1, 8, 8), labels))
        assert inference.labels is not None
        assert torch.equal(inference.labels, labels)


def test_independent_classes_of_a_batch_are_refused(
    make_model: Any, dense_net: Any, observe: Observe, multi_label: Any
) -> None:
    model = make_model(dense_net(64, 20, 5), (1, 8, 8), task=multi_label(5))
    inference = infer_labels(observe(model, torch.rand(2, 1, 8, 8), torch.ones(2, 5)))
    assert inference.labels is None
    assert "multi-label" in (inference.reason or "")


def test_models_without_a_classification_layer_are_refused_with_the_reason(make_model: Any) -> None:
    class ConvolutionHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(1, 3, 8)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.head(images).flatten(1)
            return output

    reason = why_no_labels(make_model(ConvolutionHead(), (1, 8, 8)), 1)
    assert reason is not None
    assert "no dense layer" in reason
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.LayerNorm(3))
    reason = why_no_labels(make_model(hidden, (1, 8, 8)), 1)
    assert reason is not None
    assert "come after" in reason


@given(st.lists(st.floats(-3, 12), min_size=1, max_size=12), st.integers(0, 40))
def test_rounding_gives_counts_with_the_right_sum(estimate: list[float], total: int) -> None:
    counts = round_to_sum(torch.tensor(estimate), total)
    assert int(counts.sum()) == total
    assert int(counts.min()) >= 0


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_rounding_leaves_whole_numbers_alone(counts: list[int]) -> None:
    assert round_to_sum(torch.tensor(counts, dtype=torch.float64), sum(counts)).tolist() == counts


@given(
    st.lists(st.floats(-1e15, 1e15) | st.floats(-3.0, 5.0), min_size=1, max_size=4),
    st.integers(1, 4),
)
def test_counts_are_the_nearest_whole_numbers_with_that_sum(estimate: list[float], total: int) -> None:
    """Against all candidates. Noise makes estimates of millions, which must not take millions of steps."""
    found = round_to_sum(torch.tensor(estimate, dtype=torch.float64), total)
    assert int(found.sum()) == total
    candidates = [c for c in product(range(total + 1), repeat=len(estimate)) if sum(c) == total]
    point = [Fraction(value) for value in estimate]
    distance = [sum((value - count) ** 2 for value, count in zip(point, c, strict=True)) for c in candidates]
    own = sum((value - int(count)) ** 2 for value, count in zip(point, found, strict=True))
    slack = 1e-6 * (1 + max(abs(value) for value in estimate))
    assert float(own - min(distance)) <= slack


def test_noise_on_a_batch_gives_some_labels_at_once(make_model: Any, sigmoid_lenet: Any, observe: Observe) -> None:
    model = make_model(sigmoid_lenet(classes=4), (1, 12, 12), 4)
    clean = observe(model, torch.rand(2, 1, 12, 12), torch.tensor([0, 3]))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        noisy = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in clean.update.trainable.items()}
        inference = infer_labels(replace(clean, update=replace(clean.update, trainable=noisy)))
        assert inference.labels is not None
        assert len(inference.labels) == 2


def test_momentum_counts_early_steps_more_often(make_model: Any, dense_net: Any) -> None:
    """At a tiny learning rate all steps on one image have one gradient, however often momentum repeats it."""
    model = make_model(dense_net(64, 20), (1, 8, 8), double=True)
    batch = Batch(torch.rand(1, 1, 8, 8), torch.tensor([2]))
    recipe = Recipe(update="delta", epochs=4, momentum=0.9, learning_rate=1e-7, precision="float64")
    update, _ = client_step(model, batch, recipe)
    gradient, _ = client_step(model, batch, Recipe(precision="float64"))
    view = gradient_view(Observation(model, update, recipe, "honest_server"))
    for name, tensor in gradient.trainable.items():
        torch.testing.assert_close(view.tensors[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_counts_are_exact_where_dummy_images_have_the_features_of_private_ones(classes: int) -> None:
    """The relation d loss / d bias_i = mean(p_i) - k_i / b, with all images alike and the right features supposed."""
    generator = torch.Generator().manual_seed(classes)
    weight = torch.randn(classes, 5, generator=generator, dtype=torch.float64)
    bias = torch.randn(classes, generator=generator, dtype=torch.float64)
    features = torch.rand(1, 5, generator=generator, dtype=torch.float64)
    outputs = torch.softmax(features @ weight.T + bias, dim=1)[0]
    for total in (1, 6, 33):
        labels = torch.randint(classes, (total,), generator=generator)
        counts = torch.bincount(labels, minlength=classes)
        bias_gradient = outputs - counts / total
        for normalized in (False, True):
            found = estimate_counts(
                [Moment(weight, bias, features)],
                torch.outer(bias_gradient, features[0]),
                bias_gradient,
                total,
                normalized,
            )
            torch.testing.assert_close(found, counts.double(), rtol=0, atol=1e-6 * total)


def test_features_far_from_dummy_ones_are_read_from_the_gradient() -> None:
    """One class prevails, so the weight's rows show what the images have in common; the dummies suppose otherwise."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    bias = torch.zeros(4, dtype=torch.float64)
    features = 2.0 * torch.rand(1, 6, generator=generator, dtype=torch.float64)
    outputs = torch.softmax(features @ weight.T, dim=1)[0]
    counts = torch.tensor([0, 7, 1, 0])
    bias_gradient = outputs - counts / 8
    wrong = [Moment(weight, bias, torch.zeros_like(features))]
    gradient = torch.outer(bias_gradient, features[0])
    supposed = 8 * (torch.softmax(bias, dim=0) - bias_gradient)
    assert round_to_sum(supposed, 8).tolist() != counts.tolist()
    assert round_to_sum(estimate_counts(wrong, gradient, bias_gradient, 8, False), 8).tolist() == counts.tolist()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("shuffle", [False, True])
def test_counts_over_local_steps_that_change_the_outputs(
    momentum: float, shuffle: bool, make_model: Any, sigmoid_lenet: Any
) -> None:
    exact, still_exact = 0, 0
    for seed in range(10):
        torch.manual_seed(seed)
        model = make_model(sigmoid_lenet(classes=4), (1, 12, 12), 4, uniform=False)
        labels = torch.randint(0, 4, (8,), generator=torch.Generator().manual_seed(seed))
        recipe = Recipe(
            update="delta",
            batch_size=2,
            local_steps=4,
            epochs=3,
            learning_rate=0.001 if momentum else 0.01,
            momentum=momentum,
            shuffle=shuffle,
        )
        update, _ = client_step(model, Batch(torch.rand(8, 1, 12, 12), labels), recipe, generator=torch.Generator())
        seen = Observation(model, update, recipe, "honest_server")
        found = infer_labels(seen).labels
        assert found is not None
        exact += torch.equal(found, labels.sort().values)
        view = gradient_view(seen)
        still = replace(seen, update=replace(update, kind="gradient", trainable=view.tensors), recipe=None)
        reference = infer_labels(still).labels
        assert reference is not None
        still_exact += torch.equal(reference, labels.sort().values)
    assert exact >= 7
    assert exact > still_exact

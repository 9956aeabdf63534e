"""The batched objective against plain autograd, and its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from medpfl.attacks.batch_statistics import KnownStatistics
from medpfl.attacks.idlg import IDLG
from medpfl.attacks.matching.gradients import Layout, Method, matching_objective
from medpfl.attacks.matching.initialization import INITIALIZATIONS, tiled
from medpfl.attacks.matching.objectives import DISTANCES, squared_distance, top_tensors
from medpfl.attacks.matching.priors import median_filter, no_prior, small, smooth, together
from medpfl.attacks.matching.problem import Problem, build_problem
from medpfl.attacks.matching.statistics import StatisticsPrior, statistics_prior
from medpfl.core.domain import Batch, Failure, GlobalModel, Observation, Recipe, Reconstruction, Update
from medpfl.federation.client import client_step

Observe = Callable[..., Observation]


@pytest.fixture
def observations(make_model: Any, sigmoid_lenet: Any, observe: Observe) -> list[Observation]:
    generator = torch.Generator().manual_seed(0)
    model = make_model(sigmoid_lenet(), (1, 12, 12), double=True)
    return [
        observe(model, torch.rand(2, 1, 12, 12, generator=generator, dtype=torch.float64), torch.tensor([label, 2]))
        for label in (0, 1)
    ]


def labels_of(count: int) -> Tensor:
    return torch.tensor([[label, 2] for label in range(count)])


def weights_of(problem: Problem) -> Tensor:
    return torch.ones(len(problem.models), len(problem.names), dtype=problem.dtype)


def plain_value(model: GlobalModel, images: Tensor, target: Tensor, observed: Update, distance: str) -> Tensor:
    """Distance of one candidate by nothing but autograd; target: class weights (K, classes)."""
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in model.parameters.items()}
    output = torch.func.functional_call(model.module, {**parameters, **model.buffers}, (images,))
    loss = -(target * output.log_softmax(dim=1)).sum(dim=1).mean()
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    mine = torch.cat([gradient.flatten() for gradient in gradients])
    theirs = torch.cat([observed.trainable[name].flatten() for name in parameters]).to(mine.dtype)
    if distance == "l2":
        return ((mine - theirs) ** 2).sum()
    if distance == "l1":
        return (mine - theirs).abs().sum()
    if distance == "layer_cosine":
        pairs = [(gradients[place], observed.trainable[name]) for place, name in enumerate(parameters)]
        cosines = [torch.nn.functional.cosine_similarity(a.flatten(), b.flatten().to(a), dim=0) for a, b in pairs]
        return torch.stack([1 - cosine for cosine in cosines]).mean()
    return 1 - torch.nn.functional.cosine_similarity(mine, theirs, dim=0)


@pytest.mark.parametrize("distance", ["l2", "l1", "cosine", "layer_cosine"])
@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_value_and_derivative_are_those_of_autograd(
    distance: str, method: Method, observations: list[Observation]
) -> None:
    problem = build_problem(observations, "float64")
    layout = Layout((2, 1, 12, 12), (3,))
    objective = matching_objective(
        problem,
        layout,
        None,
        distance=DISTANCES[distance],
        weights=weights_of(problem),
        prior=smooth(0.1),
        method=method,
    )
    variables = torch.rand(3, layout.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    victims = torch.tensor([1, 0, 1])
    values, derivatives = objective(variables, victims)
    for row, victim in enumerate(victims.tolist()):
        flat = variables[row].clone().requires_grad_()
        images, logits = flat[:288].reshape(2, 1, 12, 12), flat[288:].reshape(2, 3)
        observation = observations[victim]
        expected = plain_value(observation.model, images, logits.softmax(1), observation.update, distance)
        variation = (images[..., 1:] - images[..., :-1]).abs().mean() + (
            images[..., 1:, :] - images[..., :-1, :]
        ).abs().mean()
        expected = expected + 0.1 * variation
        (derivative,) = torch.autograd.grad(expected, flat)
        torch.testing.assert_close(values[row], expected.detach(), atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(derivatives[row], derivative, atol=1e-12, rtol=1e-9)


def test_truth_has_objective_and_derivative_zero(observe: Observe, make_model: Any, sigmoid_lenet: Any) -> None:
    images = torch.rand(2, 1, 12, 12, dtype=torch.float64)
    model = make_model(sigmoid_lenet(), (1, 12, 12), double=True)
    problem = build_problem([observe(model, images, torch.tensor([0, 1]))], "float64")
    objective = matching_objective(
        problem,
        Layout((2, 1, 12, 12)),
        torch.tensor([[0, 1]]),
        distance=squared_distance,
        weights=weights_of(problem),
        prior=no_prior,
    )
    value, derivative = objective(images.reshape(1, -1), torch.tensor([0]))
    assert float(value) < 1e-28
    assert float(derivative.abs().max()) < 1e-13


def test_vmap_and_loop_agree_on_nets_that_differ_between_victims(
    make_model: Any, sigmoid_lenet: Any, observe: Observe
) -> None:
    models = [make_model(sigmoid_lenet(), (1, 12, 12), seed=seed, double=True) for seed in range(3)]
    images = torch.rand(3, 2, 1, 12, 12, dtype=torch.float64)
    seen = [observe(one, images[row], torch.tensor([row, 2])) for row, one in enumerate(models)]
    problem = build_problem(seen, "float64")
    assert not problem.shared
    weights = top_tensors(problem.targets, 3)
    variables = torch.rand(4, 288, dtype=torch.float64)
    victims = torch.tensor([0, 2, 1, 2])
    results = [
        matching_objective(
            problem,
            Layout((2, 1, 12, 12)),
            labels_of(3),
            distance=DISTANCES["cosine"],
            weights=weights,
            prior=no_prior,
            method=method,
        )(variables, victims)
        for method in ("vmap", "loop")
    ]
    torch.testing.assert_close(results[0], results[1], atol=1e-13, rtol=1e-9)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_runs_in_both_ways(mode: Any, make_model: Any) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    model = make_model(net, (1, 8, 8), uniform=False)
    recipe = Recipe(batch_size=2, batch_norm=mode, precision="float64")
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    update, _ = client_step(model, Batch(images, torch.tensor([0, 1])), recipe)
    problem = build_problem([Observation(model, update, recipe, "eavesdropper")], "float64")
    for method in ("vmap", "loop"):
        objective = matching_objective(
            problem,
            Layout((2, 1, 8, 8)),
            torch.tensor([[0, 1]]),
            distance=squared_distance,
            weights=weights_of(problem),
            prior=no_prior,
            method=method,
        )
        at_truth, _ = objective(images.reshape(1, -1), torch.tensor([0]))
        elsewhere, _ = objective(images.reshape(1, -1) + 0.3 * torch.rand(1, 128), torch.tensor([0]))
        assert float(at_truth) < 1e-20
        assert float(elsewhere) > 1e-8


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(update="delta", learning_rate=0.3, batch_size=2, weight_decay=0.1),
        Recipe(update="weights", learning_rate=0.3, batch_size=2),
        Recipe(update="delta", learning_rate=0.3, batch_size=1, local_steps=2, momentum=0.9),
        Recipe(update="weights", learning_rate=0.3, batch_size=2, epochs=3, weight_decay=0.01),
        Recipe(update="gradient", batch_size=2, gradient_clip=0.01),
        Recipe(update="delta", batch_size=2, optimizer="adam", learning_rate=0.01),
    ],
)
@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_truth_explains_every_kind_of_update(
    recipe: Recipe, method: Method, make_model: Any, sigmoid_lenet: Any
) -> None:
    model = make_model(sigmoid_lenet(), (1, 12, 12))
    images = torch.rand(2, 1, 12, 12, dtype=torch.float64)
    update, _ = client_step(model, Batch(images, torch.tensor([0, 1])), replace(recipe, precision="float64"))
    problem = build_problem([Observation(model, update, recipe, "honest_server")], "float64")
    objective = matching_objective(
        problem,
        Layout((2, 1, 12, 12)),
        torch.tensor([[0, 1]]),
        distance=squared_distance,
        weights=weights_of(problem),
        prior=no_prior,
        method=method,
    )
    at_truth, _ = objective(images.reshape(1, -1), torch.tensor([0]))
    elsewhere, derivative = objective(1 - images.reshape(1, -1), torch.tensor([0]))
    scale = float(problem.squared_norms(weights_of(problem)))
    assert float(at_truth) < 1e-18 * scale
    assert float(elsewhere) > 1e-6 * scale
    assert bool(torch.isfinite(derivative).all())


def test_the_largest_tensors_are_chosen_per_victim() -> None:
    targets = [torch.tensor([[1.0], [9.0]]), torch.tensor([[5.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0], [4.0]])]
    assert top_tensors(targets, 2).tolist() == [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]
    assert top_tensors(targets, 9).tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("shape", [(9, 7), (5, 4, 6), (11,), (1, 5)])
def test_median_filter_is_that_of_scipy(shape: tuple[int, ...]) -> None:
    images = torch.rand(2, 1, *shape)
    expected = np.stack(
        [[ndimage.median_filter(one.numpy(), size=3, mode="mirror") for one in image] for image in images]
    )
    assert torch.equal(median_filter(images, len(shape)), torch.from_numpy(expected))


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 1, 20, 40), (1, 2, 17, 5, 33)])
def test_tiles_repeat_and_are_cropped(shape: tuple[int, ...]) -> None:
    images = tiled(shape, torch.Generator().manual_seed(0))
    assert tuple(images.shape) == shape
    for index in np.ndindex(*shape[2:]):
        inside = tuple(position % 16 for position in index)
        assert torch.equal(images[(..., *index)], images[(..., *inside)])
    assert torch.unique(images[0, 0]).numel() == np.prod([min(size, 16) for size in shape[2:]])


@pytest.mark.parametrize("name", sorted(INITIALIZATIONS))
def test_starts_depend_on_the_generator_alone(name: str) -> None:
    one, other = (INITIALIZATIONS[name]((2, 3, 20, 9), torch.Generator().manual_seed(4)) for _ in range(2))
    assert one.dtype == torch.float64
    assert tuple(one.shape) == (2, 3, 20, 9)
    assert torch.equal(one, other)


class Branching(nn.Module):
    """Looks at a value, which PyTorch cannot do for a batch of candidates at once."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        output: Tensor = self.head(flat if float(flat.detach().sum()) > -1e9 else -flat)
        return output


class OnlyFloat32(nn.Module):
    """A layer that breaks in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.head(images.flatten(1) @ torch.eye(16))
        return output


def test_models_that_cannot_be_batched_run_in_a_loop(make_model: Any, observe: Observe) -> None:
    model = make_model(Branching(), (1, 4, 4))
    observation = observe(model, torch.rand(1, 1, 4, 4), torch.tensor([1]))
    (result,) = IDLG(iterations=2).reconstruct([observation], [torch.Generator().manual_seed(0)])
    assert isinstance(result, Reconstruction)


def test_models_that_break_in_double_precision_fail_with_the_reason(make_model: Any, observe: Observe) -> None:
    observation = observe(make_model(OnlyFloat32(), (1, 4, 4)), torch.rand(1, 1, 4, 4), torch.tensor([1]))
    (result,) = IDLG(iterations=2).reconstruct([observation], [torch.Generator().manual_seed(0)])
    assert isinstance(result, Failure)
    assert "float64" in result.reason
    (result,) = IDLG(iterations=2, precision="float32").reconstruct([observation], [torch.Generator().manual_seed(0)])
    assert isinstance(result, Reconstruction)


@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (1, 1, 5, 6, 4), (3, 2, 8, 1)])
def test_priors_on_images_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = images.numpy()
    axes = [axis for axis in range(2, len(shape)) if shape[axis] > 1]
    changes = [np.diff(plain, axis=axis) for axis in axes]
    absolute = sum(float(np.abs(change).mean()) for change in changes)
    assert float(smooth(2.0)(images)) == pytest.approx(2.0 * absolute)
    kept = tuple(slice(0, size - 1) if size > 1 else slice(None) for size in shape[2:])
    squares = sum(change[(slice(None), slice(None), *kept)] ** 2 for change in changes)
    assert float(smooth(2.0, "length")(images)) == pytest.approx(2.0 * float(np.sqrt(squares).mean()))
    mean, std = (0.4, 0.1, 0.2)[: shape[1]], (0.5, 0.25, 2.0)[: shape[1]]
    inputs = np.stack([(plain[:, channel] - mean[channel]) / std[channel] for channel in range(shape[1])], axis=1)
    assert float(small(3.0, mean, std)(images)) == pytest.approx(3.0 * float((inputs**2).mean()))
    both = together(smooth(2.0), no_prior, small(3.0, mean, std))
    assert float(both(images)) == pytest.approx(2.0 * absolute + 3.0 * float((inputs**2).mean()))
    assert together(no_prior, smooth(0.0), small(0.0, mean, std)) is no_prior


def test_flat_images_have_no_variation_and_a_derivative() -> None:
    images = torch.full((1, 1, 4, 4), 0.3, dtype=torch.float64, requires_grad=True)
    value = smooth(1.0, "length")(images)
    (slope,) = torch.autograd.grad(value, images)
    assert float(value.detach()) < 1e-5
    assert bool(torch.isfinite(slope).all())


def test_the_statistics_prior_is_what_plain_pytorch_layers_see(make_model: Any) -> None:
    net = nn.Sequential(
        nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
    )
    model = make_model(net, (2, 6, 6), double=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 2, 6, 6, generator=generator, dtype=torch.float64)
    recipe = Recipe(batch_size=4, batch_norm="train", precision="float64")
    update, _ = client_step(model, Batch(images, torch.tensor([0, 1, 2, 0])), recipe)
    problem = build_problem([Observation(model, update, recipe, "honest_server")], "float64")
    known = KnownStatistics(
        {"0": (torch.zeros(2).double(), torch.ones(2).double()), "2": (torch.ones(3).double(), torch.ones(3).double())},
        "running",
        "",
    )
    prior = statistics_prior([known], 0.5, 10.0, problem.targets[0])
    assert prior is not None

    def value(statistics: StatisticsPrior | None) -> float:
        objective = matching_objective(
            problem,
            Layout((4, 2, 6, 6)),
            torch.tensor([[0, 1, 2, 0]]),
            distance=squared_distance,
            weights=weights_of(problem),
            prior=no_prior,
            statistics=statistics,
        )
        return float(objective(images.reshape(1, -1), torch.tensor([0]))[0][0])

    double = net.double().train()
    first = images.transpose(0, 1).flatten(1)
    second = double[1](double[0](images)).transpose(0, 1).flatten(1)
    expected = sum(
        factor * float((rows.mean(1) - mean).norm() + (rows.var(1, unbiased=False) - 1).norm())
        for factor, rows, mean in ((10.0, first, 0.0), (1.0, second, 1.0))
    )
    assert value(None) == pytest.approx(0.0, abs=1e-20)
    assert value(prior) == pytest.approx(0.5 * expected)

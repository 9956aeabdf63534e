"""Every way of computing the batched objective gives the same numbers, for every model of the zoo."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medpfl.attacks.matching.compiled import (
    COMPILED_AT_ONCE,
    WORTHWHILE,
    compiled_objective,
    compiler_missing,
    worth_compiling,
)
from medpfl.attacks.matching.ghost.objective import ghost_objective
from medpfl.attacks.matching.gradients import Layout, Method, matching_objective
from medpfl.attacks.matching.objectives import DISTANCES, absolute_distance, size_weights, top_tensors
from medpfl.attacks.matching.output_error import with_known_error
from medpfl.attacks.matching.priors import smooth
from medpfl.attacks.matching.problem import Problem, build_problem
from medpfl.attacks.matching.statistics import StatisticsPrior
from medpfl.core.domain import Batch, GlobalModel, Observation, Recipe
from medpfl.core.errors import MissingExtra
from medpfl.core.tasks import Segmentation, SingleLabel, Task
from medpfl.federation.client import client_step
from medpfl.models import MODELS, SEGMENTATION, build_model
from medpfl.models.batch_norm import batch_norm_layers

GHOSTS = {"lenet_cpl", "lenet_dlg", "lenet_idlg", "resnet18", "resnet18_cifar", "unet", "unet_small"}
"""Models of the zoo that are known to consist of layers that ghost matching knows."""

SIZES = {"lenet_cpl": 12, "lenet_dlg": 12, "lenet_idlg": 12, "densenet121": 32, "efficientnet_b0": 32}
"""Pixels along an axis, 16 for the others."""


def zoo_model(name: str, size: int, seed: int = 0) -> GlobalModel:
    """A model of the zoo; the test is skipped where the extra that it comes from is not installed."""
    generator = torch.Generator().manual_seed(seed)
    task: Task = Segmentation(4) if name in SEGMENTATION else SingleLabel(4)
    try:
        return build_model(name, image_shape=(3, size, size), task=task, generator=generator)
    except MissingExtra as error:
        pytest.skip(str(error))


def pixels_of(model: GlobalModel) -> tuple[int, ...]:
    """The shape of one image's target: none for a label, (*spatial) for a mask."""
    return model.task.output_shape(model.image_shape)[1:]


def problem_of(models: list[GlobalModel], images: int, batch_norm: Literal["train", "eval"] = "eval") -> Problem:
    """Gradients of random images, one victim per model."""
    recipe = Recipe(batch_size=images, batch_norm=batch_norm, precision="float64")
    observations = []
    for seed, model in enumerate(models):
        generator = torch.Generator().manual_seed(seed)
        batch = Batch(
            torch.rand(images, *model.image_shape, generator=generator, dtype=torch.float64),
            torch.randint(4, (images, *pixels_of(model)), generator=generator),
        )
        update, _ = client_step(model.to(torch.float64), batch, recipe)
        observations.append(Observation(model, update, recipe, "eavesdropper"))
    return build_problem(observations, "float64")


def evaluated(
    problem: Problem,
    method: Method,
    distance: str,
    victims: Tensor,
    weights: Tensor | None = None,
    joint: bool = False,
    statistics: StatisticsPrior | None = None,
) -> tuple[Tensor, Tensor]:
    """Values and derivatives of random candidates."""
    model, shape = problem.models[0], (len(problem.models), problem.examples, *pixels_of(problem.models[0]))
    layout = Layout((problem.examples, *model.image_shape), model.task.output_shape(model.image_shape) if joint else ())
    labels = torch.arange(torch.Size(shape).numel()).reshape(shape) % 4
    objective = matching_objective(
        problem,
        layout,
        None if joint else labels,
        distance=DISTANCES[distance],
        weights=torch.ones(len(problem.models), len(problem.names), dtype=torch.float64)
        if weights is None
        else weights,
        prior=smooth(0.01),
        statistics=statistics,
        method=method,
    )
    generator = torch.Generator().manual_seed(9)
    return objective(torch.rand(len(victims), layout.size, dtype=torch.float64, generator=generator), victims)


WAYS: tuple[Method, Method] = ("ghost", "loop")


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for row in range(len(expected[0])):
        assert float((found[0][row] - expected[0][row]).abs()) <= 1e-5 * float(expected[0][row].abs())
        assert float((found[1][row] - expected[1][row]).norm()) <= 1e-5 * float(expected[1][row].norm())


@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("name", sorted(entry.name for entry in MODELS))
def test_all_ways_agree_on_every_model_of_the_zoo(name: str, distance: str) -> None:
    problem = problem_of([zoo_model(name, SIZES.get(name, 16))] * 2, images=1)
    victims = torch.tensor([0, 1])
    expected = evaluated(problem, "loop", distance, victims)
    ways: list[Method] = ["auto", "vmap"] if problem.models[0].parameter_count < 10**6 else ["auto"]
    if name in GHOSTS:
        ways.append("ghost")
    for way in ways:
        assert_same(evaluated(problem, way, distance, victims), expected)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("victims", [[0, 0, 0], [1, 0, 1], [0, 1, 2], [2]])
def test_batches_of_images_and_every_choice_of_victims(mode: Any, victims: list[int]) -> None:
    problem = problem_of([zoo_model("resnet18_cifar", 8)] * 3, images=2, batch_norm=mode)
    rows = torch.tensor(victims)
    assert_same(evaluated(problem, "ghost", "cosine", rows), evaluated(problem, "loop", "cosine", rows))


def test_nets_that_differ_between_victims_chosen_tensors_and_unknown_labels() -> None:
    problem = problem_of([zoo_model("lenet_idlg", 12, seed) for seed in range(3)], images=2)
    rows = torch.tensor([2, 0, 1, 2])
    weights = top_tensors(problem.targets, 3)
    for distance in ("cosine", "layer_cosine", "layer_cosine_and_norm", "l2"):
        results = [
            evaluated(problem, method, distance, rows, weights, joint=True) for method in ("ghost", "vmap", "loop")
        ]
        assert_same(results[0], results[2])
        assert_same(results[1], results[2])


@pytest.mark.parametrize("name", sorted(SEGMENTATION))
def test_batches_with_unknown_masks(name: str) -> None:
    problem = problem_of([zoo_model(name, 8, seed) for seed in range(2)], images=2)
    rows = torch.tensor([1, 0, 1])
    for distance in ("cosine", "l2"):
        expected = evaluated(problem, "loop", distance, rows, joint=True)
        for method in ("ghost", "vmap"):
            assert_same(evaluated(problem, method, distance, rows, joint=True), expected)


class Slopes(nn.Module):
    """PReLU with one slope for all channels, one per channel, and one on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.one = nn.PReLU()
        self.many = nn.PReLU(4, init=0.5)
        self.hidden = nn.Linear(4, 5)
        self.flat = nn.PReLU(5)
        self.head = nn.Linear(5, 4)

    def forward(self, images: Tensor) -> Tensor:
        values = self.many(torch.sin(self.one(self.first(images))))
        output: Tensor = self.head(torch.tanh(self.flat(self.hidden(values.mean(dim=(2, 3))))))
        return output


class Mixed(nn.Module):
    """One of each layer that ghost matching knows, in forms that the zoo does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(3, 6, 3, padding=(0, 1), stride=(1, 2), groups=3)
        self.group_norm = nn.GroupNorm(2, 6)
        self.dilated = nn.Conv2d(6, 40, 3, dilation=2, padding=2, bias=False)
        self.batch_norm = nn.BatchNorm2d(40)
        self.up = nn.ConvTranspose2d(40, 4, 2, stride=2)
        self.instance_norm = nn.GroupNorm(4, 4, affine=False)
        self.line = nn.Conv1d(4, 5, 3, stride=2)
        self.tokens = nn.Linear(7, 9)
        self.layer_norm = nn.LayerNorm(9)
        self.head = nn.Linear(9, 4)

    def forward(self, images: Tensor) -> Tensor:
        values = torch.tanh(self.group_norm(self.grouped(images)))
        values = self.instance_norm(self.up(torch.tanh(self.batch_norm(self.dilated(values)))))
        values = self.line(values.flatten(2))
        values = self.layer_norm(self.tokens(values[..., :7]))
        output: Tensor = self.head(torch.tanh(values).mean(dim=1))
        return output


class Volume(nn.Module):
    """Three spatial dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm3d(4)
        self.head = nn.Linear(4, 4)

    def forward(self, volumes: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(self.norm(self.first(volumes))).square().mean(dim=(2, 3, 4)))
        return output


@pytest.mark.parametrize("distance", ["cosine", "layer_cosine", "layer_cosine_and_norm", "l2"])
@pytest.mark.parametrize(("net", "shape"), [(Mixed, (3, 8, 8)), (Slopes, (3, 8, 8)), (Volume, (1, 4, 5, 6))])
def test_every_known_layer_in_unusual_forms(net: Any, shape: tuple[int, ...], distance: str, make_model: Any) -> None:
    problem = problem_of([make_model(net(), shape, classes=4)] * 2, images=2)
    rows = torch.tensor([0, 1, 1])
    weights = size_weights(problem.targets, 0.5) if distance.startswith("layer") else None
    found, expected = (evaluated(problem, method, distance, rows, weights) for method in WAYS)
    assert_same(found, expected)


def test_candidates_that_are_given_output_errors() -> None:
    """The last layer's output gradient is then a constant, through which nothing flows."""
    problem = with_known_error(problem_of([zoo_model("resnet18_cifar", 8)] * 2, images=1))
    errors = torch.rand(2, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) - 0.5
    variables = torch.rand(2, 3 * 8 * 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found, expected = (
        matching_objective(
            problem,
            Layout((1, 3, 8, 8)),
            errors,
            distance=DISTANCES["cosine"],
            weights=torch.ones(2, len(problem.names), dtype=torch.float64),
            prior=smooth(0.01),
            method=method,
        )(variables, torch.tensor([0, 1]))
        for method in WAYS
    )
    assert_same(found, expected)


def random_statistics(problem: Problem, weight: float) -> StatisticsPrior:
    """Other expectations for every victim and batch norm layer."""
    generator = torch.Generator().manual_seed(3)
    sizes = {path: layer.num_features for path, layer in batch_norm_layers(problem.models[0]).items()}
    victims = len(problem.models)

    def drawn() -> tuple[Tensor, ...]:
        return tuple(
            torch.rand(victims, size, generator=generator, dtype=torch.float64) + 0.5 for size in sizes.values()
        )

    weights = weight * torch.rand(victims, len(sizes), generator=generator, dtype=torch.float64)
    return StatisticsPrior(tuple(sizes), weights, drawn(), drawn())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["resnet18_cifar", "densenet121", "efficientnet_b0", "mixed", "volume"])
def test_all_ways_agree_on_batch_norm_statistics(name: str, mode: Any, make_model: Any) -> None:
    if name in ("mixed", "volume"):
        net, shape = (Mixed(), (3, 8, 8)) if name == "mixed" else (Volume(), (1, 4, 5, 6))
        models = [make_model(net, shape, classes=4)] * 2
        ways: list[Method] = ["ghost", "vmap", "compiled"]
    else:
        models = [zoo_model(name, SIZES.get(name, 8))] * 2
        ways = ["ghost"] if name in GHOSTS else ["auto"]
    problem = problem_of(models, images=2, batch_norm=mode)
    rows, statistics = torch.tensor([1, 0]), random_statistics(problem, 0.1)
    expected = evaluated(problem, "loop", "cosine", rows, statistics=statistics)
    without = evaluated(problem, "loop", "cosine", rows)
    assert bool((expected[0] > without[0]).all())
    for way in ways:
        assert_same(evaluated(problem, way, "cosine", rows, statistics=statistics), expected)


def test_statistics_of_simulated_clients_are_those_before_training(make_model: Any) -> None:
    models = [make_model(Mixed(), (3, 8, 8), classes=4)]
    plain = problem_of(models, images=2, batch_norm="train")
    recipe = Recipe(update="delta", batch_size=1, local_steps=2, batch_norm="train", precision="float64")
    problem = replace(plain, simulate=recipe, steps=2)
    rows, statistics = torch.tensor([0, 0]), random_statistics(plain, 0.1)
    expected = evaluated(problem, "loop", "l2", rows, statistics=statistics)
    assert_same(evaluated(problem, "vmap", "l2", rows, statistics=statistics), expected)
    added = expected[0] - evaluated(problem, "loop", "l2", rows)[0]
    alone = [evaluated(plain, "loop", "l2", rows, statistics=one)[0] for one in (statistics, None)]
    assert alone[1] is not None
    torch.testing.assert_close(added, alone[0] - alone[1], atol=1e-9, rtol=1e-6)


class Twice(nn.Module):
    """Uses one layer twice and its weight a third time."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(9, 9)
        self.head = nn.Linear(9, 4)

    def forward(self, images: Tensor) -> Tensor:
        values = torch.tanh(self.body(torch.tanh(self.body(images.flatten(1)))))
        output: Tensor = self.head(torch.tanh(F.linear(values, self.body.weight)))
        return output


class MixesImages(nn.Module):
    """Subtracts the mean image of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(9, 4)

    def forward(self, images: Tensor) -> Tensor:
        values = images.flatten(1)
        output: Tensor = self.head(torch.tanh(values - 0.5 * values.mean(dim=0)))
        return output


class Bare(nn.Module):
    """A parameter outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(9))
        self.head = nn.Linear(9, 4)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(images.flatten(1) * self.scale))
        return output


@pytest.mark.parametrize("net", [Twice, MixesImages, Bare])
def test_models_that_ghost_matching_would_get_wrong_are_computed_otherwise(net: Any, make_model: Any) -> None:
    problem = problem_of([make_model(net(), (1, 3, 3), classes=4)] * 2, images=2)
    rows = torch.tensor([0, 1, 1])
    assert_same(evaluated(problem, "auto", "cosine", rows), evaluated(problem, "loop", "cosine", rows))


def test_ghost_matching_says_where_it_does_not_apply() -> None:
    problem = problem_of([zoo_model("lenet_dlg", 12)], images=1)
    with pytest.raises(ValueError, match="this distance"):
        evaluated(problem, "ghost", "l1", torch.tensor([0]))
    labels, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, len(problem.names))
    layout = Layout((1, 3, 12, 12))
    parts: dict[str, Any] = {"distance": absolute_distance, "weights": weights, "prior": smooth(0.0)}
    assert ghost_objective(problem, layout, labels, **parts) is None


@pytest.mark.skipif(compiler_missing(), reason="needs a C++ compiler")
def test_compiled_batches_and_what_is_left_over_give_the_same_numbers(make_model: Any) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 3), nn.Tanh(), nn.Linear(3, 4))
    problem = problem_of([make_model(net, (1, 3, 3), classes=4)] * 2, images=1)
    rows = torch.arange(COMPILED_AT_ONCE + 3) % 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = evaluated(problem, "compiled", "cosine", rows)
    assert_same(found, evaluated(problem, "loop", "cosine", rows))


def test_what_cannot_be_compiled_runs_uncompiled_and_says_so() -> None:
    def eager(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        return variables.sum(dim=1), torch.ones_like(variables)

    def unsupported(variables: Tensor) -> tuple[Tensor, Tensor]:
        if float(variables.sum()) > 0:
            return variables, variables.sum(dim=1)
        return variables, variables.mean(dim=1)

    objective = compiled_objective(eager, unsupported, lambda _: ())
    variables, victims = torch.rand(COMPILED_AT_ONCE, 2), torch.zeros(COMPILED_AT_ONCE, dtype=torch.int64)
    with pytest.warns(UserWarning, match="uncompiled"):
        values, _ = objective(variables, victims)
    torch.testing.assert_close(values, variables.sum(dim=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(variables, victims)


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, make_model: Any) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    problem = problem_of([make_model(net, (1, 3, 3), classes=4)], images=1)
    rows = torch.zeros(COMPILED_AT_ONCE, dtype=torch.int64)
    with pytest.warns(UserWarning, match="no C"):
        found = evaluated(problem, "compiled", "l2", rows)
    assert_same(found, evaluated(problem, "loop", "l2", rows))


def test_compiling_has_to_amortize(make_model: Any) -> None:
    problem = problem_of([make_model(nn.Sequential(nn.Flatten(), nn.Linear(9, 4)), (1, 3, 3), classes=4)], images=1)
    single = replace(problem, targets=tuple(target.float() for target in problem.targets))
    assert [worth_compiling(count, single) for count in (1_000, WORTHWHILE)] == [False, True]
    assert not worth_compiling(WORTHWHILE, problem)

"""Parts of objectives and starts, against PyTorch's own distributions and plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medpfl.attacks.gradinv import GradInv
from medpfl.attacks.matching.adam import Adam
from medpfl.attacks.matching.gradients import Layout, Method, matching_objective
from medpfl.attacks.matching.initialization import picture
from medpfl.attacks.matching.inversion import invert
from medpfl.attacks.matching.objectives import (
    Distance,
    absolute_distance,
    cosine_distance,
    largest_entries,
    named_weights,
    squared_distance,
    where_observed,
)
from medpfl.attacks.matching.priors import no_prior
from medpfl.attacks.matching.problem import build_problem
from medpfl.attacks.matching.settings import Inversion
from medpfl.core.domain import Batch, Failure, GlobalModel, Knowledge, Observation, Recipe, Reconstruction
from medpfl.core.mechanisms import LaplaceNoise
from medpfl.core.session import NO_SESSION
from medpfl.federation.client import client_step


def test_largest_entries_are_taken_over_all_tensors_of_a_victim() -> None:
    targets = [torch.tensor([[[1.0, -9.0]], [[5.0, 6.0]]]), torch.tensor([[3.0, 8.0, 0.5], [1.0, 2.0, 3.0]])]
    first, second = largest_entries(targets, 0.4)
    assert first.tolist() == [[[0.0, -9.0]], [[5.0, 6.0]]]
    assert second.tolist() == [[0.0, 8.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("distance", [squared_distance, absolute_distance, cosine_distance])
def test_entries_that_were_not_observed_count_nothing(distance: Distance) -> None:
    targets = [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 4.0])]
    gradients = [torch.tensor([3.0, 7.0, 1.0]), torch.tensor([9.0, 2.0])]
    found = where_observed(distance)(gradients, targets, torch.ones(2))
    without = [torch.tensor([3.0, 1.0]), torch.tensor([2.0])], [torch.tensor([1.0, 2.0]), torch.tensor([4.0])]
    assert float(found) == pytest.approx(float(distance(*without, torch.ones(2))))


@pytest.fixture
def model(make_model: Any, sigmoid_lenet: Any) -> GlobalModel:
    result: GlobalModel = make_model(sigmoid_lenet(), (1, 12, 12))
    return result


def observed(model: GlobalModel, image: Tensor, knows: Knowledge | None = None) -> Observation:
    update, _ = client_step(model, Batch(image, torch.tensor([1])), Recipe())
    return Observation(model, update, Recipe(), "eavesdropper", knows or Knowledge())


@pytest.mark.parametrize("name", ["l1", "largest"])
def test_distances_that_one_way_cannot_do_are_computed_by_another(name: str, model: GlobalModel) -> None:
    problem = build_problem([observed(model, torch.rand(1, 1, 12, 12))], "float64")
    weights = named_weights(problem.names, {"*bias": 2.0, "0.*": 0.5})[None]
    distance = absolute_distance if name == "l1" else where_observed(cosine_distance)
    layout = Layout((1, 1, 12, 12))
    variables, victims = torch.rand(3, 144).double(), torch.zeros(3, dtype=torch.int64)
    methods: list[Method] = ["loop", "vmap", "auto"]
    results = [
        matching_objective(
            problem,
            layout,
            torch.tensor([[1]]),
            distance=distance,
            weights=weights,
            prior=no_prior,
            method=method,
        )(variables, victims)
        for method in methods
    ]
    for value, derivative in results[1:]:
        assert torch.allclose(value, results[0][0], rtol=1e-6)
        assert torch.allclose(derivative, results[0][1], rtol=1e-5, atol=1e-12)


def compose(observation: Observation, **parts: Any) -> Reconstruction | Failure:
    settings = Inversion(
        labels="inferred",
        solver=lambda setup: Adam(setup.layout, iterations=20, learning_rate=0.05, scale=(1.0,)),
        precision="float64",
        restarts=1,
        **{"start": picture(torch.full((1, 12, 12), 0.5)), "distance": "cosine", **parts},
    )
    return invert([observation], [torch.Generator().manual_seed(0)], NO_SESSION, settings)[0]


def test_a_search_starts_from_the_given_image_and_matches_the_named_tensors(model: GlobalModel) -> None:
    image = torch.rand(1, 1, 12, 12)
    there = compose(observed(model, image), start=picture(image[0]), tensors={"0.*": 1.0})
    assert isinstance(there, Reconstruction)
    assert there.trace[0][1] < 1e-6
    nowhere = compose(observed(model, image), tensors={"conv*": 1.0})
    assert isinstance(nowhere, Failure)
    assert nowhere.reason == "no trainable tensor has a name like conv*"


def test_largest_entries_of_an_update_are_matched(model: GlobalModel) -> None:
    found = compose(observed(model, torch.rand(1, 1, 12, 12)), largest_entries=0.1)
    assert isinstance(found, Reconstruction)
    assert found.objective < found.trace[0][1]


def test_the_likelihood_reads_the_defense_and_nothing_else(model: GlobalModel) -> None:
    attack = GradInv(distance="likelihood", iterations=10, output_error="candidate")
    assert attack.uses() == {"defense"}
    assert GradInv().uses() == frozenset()
    image = torch.rand(1, 1, 12, 12)
    seen = observed(model, image, Knowledge(defense=LaplaceNoise(0.5)))
    (found,) = attack.reconstruct([seen], [torch.Generator().manual_seed(0)])
    assert isinstance(found, Reconstruction)
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in model.parameters.items()}
    output = torch.func.functional_call(model.module, parameters, (found.images,))
    gradients = torch.autograd.grad(nn.functional.cross_entropy(output, torch.tensor([1])), list(parameters.values()))
    noise: Any = torch.distributions.Laplace(0.0, 0.5)
    sent = list(seen.update.trainable.values())
    differences = torch.cat([(one - other).flatten() for one, other in zip(sent, gradients, strict=True)])
    expected = (noise.log_prob(torch.zeros_like(differences)) - noise.log_prob(differences)).sum()
    assert found.objective == pytest.approx(float(expected), rel=0.05)

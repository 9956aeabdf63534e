"""Likelihoods of known defenses, against PyTorch's own distributions and plain loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from medpfl.attacks.gradinv import GradInv
from medpfl.attacks.matching.gradients import Layout, Method, matching_objective
from medpfl.attacks.matching.likelihoods import (
    Likelihood,
    NotCombined,
    View,
    even,
    likelihood,
    likelihood_of,
    why_no_likelihood,
)
from medpfl.attacks.matching.priors import no_prior
from medpfl.attacks.matching.problem import build_problem
from medpfl.attacks.maximum_a_posteriori import MaximumAPosteriori
from medpfl.attacks.updates import averaged
from medpfl.core.domain import Auxiliary, Batch, GlobalModel, Knowledge, Observation, Recipe, Reconstruction, Update
from medpfl.core.mechanisms import Composed, GaussianNoise, LaplaceNoise, Mechanism, Unchanged
from medpfl.defenses.laplace import Laplace
from medpfl.federation.client import client_step


@dataclass(frozen=True)
class Halved(Mechanism):
    """Of the tests: everything is halved."""


@dataclass(frozen=True)
class FirstHidden(Mechanism):
    """Of the tests: the first tensor says nothing."""


@dataclass(frozen=True)
class Thinned(Mechanism):
    """Of the tests: some entries are set to zero."""


@dataclass(frozen=True)
class Strange(Mechanism):
    """Of the tests: nobody knows its likelihood."""


@likelihood_of(Halved)
def halved(mechanism: Halved, view: View) -> Likelihood:
    return Likelihood(transform=lambda gradients, _targets: [0.5 * one for one in gradients])


@likelihood_of(FirstHidden)
def first_hidden(mechanism: FirstHidden, view: View) -> Likelihood:
    weights = even(view, 1.0)
    weights[0] = 0.0
    return Likelihood(weights=weights)


@likelihood_of(Thinned)
def thinned(mechanism: Thinned, view: View) -> Likelihood:
    return Likelihood(survivors=True, notes=("some entries are missing",))


@pytest.fixture
def model(make_model: Any, sigmoid_lenet: Any) -> GlobalModel:
    result: GlobalModel = make_model(sigmoid_lenet(), (1, 12, 12))
    return result


def seen_through(model: GlobalModel, recipe: Recipe | None = None) -> View:
    targets = tuple(torch.zeros_like(tensor)[None] for tensor in model.parameters.values())
    return View(tuple(model.parameters), targets, model, recipe or Recipe())


def value(mechanism: Mechanism, view: View, gradients: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    one = likelihood(mechanism, view)
    weights = one.tensor_weights(view.names)[: len(gradients)]
    return float(one.matching()([tensor.double() for tensor in gradients], targets, weights))


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(update="delta", learning_rate=0.3, local_steps=2, epochs=3)])
@pytest.mark.parametrize(
    ("mechanism", "noise"),
    [
        (LaplaceNoise(0.2), torch.distributions.Laplace(0.0, 0.2)),
        (GaussianNoise(0.3), torch.distributions.Normal(0.0, 0.3)),
        (Composed((GaussianNoise(0.3), GaussianNoise(0.4))), torch.distributions.Normal(0.0, 0.5)),
    ],
)
def test_the_likelihood_is_that_of_the_noise_on_what_was_sent(
    recipe: Recipe, mechanism: Mechanism, noise: Any, model: GlobalModel
) -> None:
    view = seen_through(model, recipe)
    sent, candidates = torch.randn(7).double(), torch.randn(2, 7).double()
    unit = 1.0 if recipe.update == "gradient" else -0.3 * 6  # a gradient moves the weights by so much of it
    values = [value(mechanism, view, [one / unit], [sent / unit]) for one in candidates]
    expected = [-noise.log_prob(sent - one).sum() for one in candidates]
    assert values[0] - values[1] == pytest.approx(float(expected[0] - expected[1]), rel=1e-5)


@pytest.mark.parametrize(
    ("mechanism", "noise"),
    [
        (LaplaceNoise(0.2), torch.distributions.Laplace(0.0, 0.2)),
        (GaussianNoise(0.3), torch.distributions.Normal(0.0, 0.3)),
        (Composed((Halved(), GaussianNoise(0.3))), torch.distributions.Normal(0.0, 0.3)),
    ],
)
def test_fresh_noise_of_several_rounds_is_independent(mechanism: Mechanism, noise: Any, model: GlobalModel) -> None:
    sent, candidates = torch.randn(3, 1, 7).double(), torch.randn(2, 7).double()
    name = next(iter(model.parameters))
    view = View((name,), (sent[2],), model, Recipe(), earlier=((sent[0],), (sent[1],)))
    one = likelihood(mechanism, view)
    targets = [tensor[0] for tensor in one.evidence or view.targets]
    values = [one.matching()([candidate], targets, one.tensor_weights(view.names)) for candidate in candidates]
    share = 0.5 if isinstance(mechanism, Composed) else 1.0
    expected = [-noise.log_prob(sent[:, 0] - share * candidate).sum() for candidate in candidates]
    assert float(values[0] - values[1]) == pytest.approx(float(expected[0] - expected[1]), rel=1e-5)


def test_several_rounds_show_more_than_one(model: GlobalModel, blobs: Any) -> None:
    image, owned = blobs(1, (1, 12, 12), seed=4), blobs(60, (1, 12, 12), seed=1)
    generator = torch.Generator().manual_seed(0)
    updates = [
        client_step(model, Batch(image, torch.tensor([1])), Recipe(), hooks=Laplace(scale=0.05), generator=generator)[0]
        for _ in range(16)
    ]
    auxiliary = Auxiliary(owned, torch.arange(60) % 3)
    knows = Knowledge(defense=LaplaceNoise(0.05), auxiliary=auxiliary)
    attack = MaximumAPosteriori(iterations=60)

    def error(earlier: Sequence[Update]) -> float:
        seen = Observation(model, updates[0], Recipe(), "eavesdropper", knows, earlier=tuple(earlier))
        (found,) = attack.reconstruct([seen], [torch.Generator().manual_seed(0)])
        assert isinstance(found, Reconstruction)
        return float((found.images - image).square().mean())

    assert error(updates[1:]) < 0.6 * error(())


def test_distances_without_a_likelihood_are_taken_from_the_mean_of_all_rounds(model: GlobalModel) -> None:
    image = torch.rand(1, 1, 12, 12)
    first, second = (observed(model, image, Recipe(), halve, Unchanged()) for halve in (True, False))
    mean = averaged(replace(first, earlier=(second.update,)))
    for name, tensor in mean.update.trainable.items():
        torch.testing.assert_close(tensor, 0.75 * second.update.trainable[name])
    attack = GradInv(distance="l2", iterations=3, output_error="candidate")
    found = [
        attack.reconstruct([one], [torch.Generator().manual_seed(0)])[0]
        for one in (mean, replace(first, earlier=(second.update,)))
    ]
    assert all(isinstance(one, Reconstruction) for one in found)
    assert found[0].objective == found[1].objective  # type: ignore[union-attr]


@pytest.mark.parametrize("mechanism", [None, Unchanged(), Strange()])
def test_without_a_known_likelihood_squared_differences_are_taken(
    mechanism: Mechanism | None, model: GlobalModel
) -> None:
    view = seen_through(model)
    one = likelihood(mechanism, view)
    found = one.matching()([torch.tensor([1.0, 4.0])], [torch.tensor([3.0, 1.0])], torch.ones(1))
    assert float(found) == pytest.approx(13.0)
    assert bool((one.tensor_weights(view.names) == 1).all())
    assert bool(one.notes) == isinstance(mechanism, Strange)


def test_what_is_deterministic_happens_to_the_candidate_before_the_noise(model: GlobalModel) -> None:
    view = seen_through(model)
    found = value(Composed((Halved(), LaplaceNoise(0.5))), view, [torch.tensor([4.0, -2.0])], [torch.zeros(2)])
    assert found == pytest.approx((2.0 + 1.0) / 0.5)
    nested = Composed((Composed((Halved(), Halved())), LaplaceNoise(0.5)))
    assert value(nested, view, [torch.tensor([4.0, -2.0])], [torch.zeros(2)]) == pytest.approx((1.0 + 0.5) / 0.5)


def test_hidden_tensors_and_missing_entries_count_nothing(model: GlobalModel) -> None:
    view = seen_through(model)
    gradients, targets = [torch.tensor([4.0]), torch.tensor([3.0, 5.0])], [torch.zeros(1), torch.tensor([1.0, 0.0])]
    assert value(Composed((FirstHidden(), LaplaceNoise(0.5))), view, gradients, targets) == pytest.approx((2 + 5) / 0.5)
    assert value(Composed((LaplaceNoise(0.5), Thinned())), view, gradients, targets) == pytest.approx(2 / 0.5)
    assert likelihood(Composed((LaplaceNoise(0.5), Thinned())), view).notes == ("some entries are missing",)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [((LaplaceNoise(0.1), Halved()), "put the noise last"), ((LaplaceNoise(0.1), GaussianNoise(1.0)), "one kind")],
)
def test_what_cannot_be_combined_is_refused_with_the_reason(
    parts: tuple[Mechanism, ...], reason: str, model: GlobalModel
) -> None:
    with pytest.raises(NotCombined, match=reason):
        likelihood(Composed(parts), seen_through(model))
    assert reason in (why_no_likelihood(Composed(parts), model, Recipe(), 1) or "")
    assert reason in (GradInv(distance="likelihood").why_not_against(Composed(parts), model, Recipe(), 1) or "")
    assert GradInv().why_not_against(Composed(parts), model, Recipe(), 1) is None


def observed(model: GlobalModel, image: Tensor, recipe: Recipe, halve: bool, mechanism: Mechanism) -> Observation:
    update, _ = client_step(model, Batch(image, torch.tensor([1])), recipe)
    if halve:
        update = replace(update, trainable={name: 0.5 * tensor for name, tensor in update.trainable.items()})
    return Observation(model, update, recipe, "eavesdropper", Knowledge(defense=mechanism))


@pytest.mark.parametrize("method", ["loop", "vmap", "auto"])
def test_all_ways_compute_transformed_gradients(method: Method, model: GlobalModel) -> None:
    view = seen_through(model)
    one = likelihood(Composed((Halved(), FirstHidden(), LaplaceNoise(0.5))), view)
    problem = build_problem([observed(model, torch.rand(1, 1, 12, 12), Recipe(), False, Unchanged())], "float64")
    variables, victims = torch.rand(3, 144).double(), torch.zeros(3, dtype=torch.int64)
    objective = matching_objective(
        problem,
        Layout((1, 1, 12, 12)),
        torch.tensor([[1]]),
        distance=one.matching(),
        weights=one.tensor_weights(view.names)[None],
        prior=no_prior,
        method=method,
    )
    values, derivatives = objective(variables, victims)
    for flat, found, derivative in zip(variables, values, derivatives, strict=True):
        image = flat.clone().requires_grad_()
        parameters = {name: tensor.double().requires_grad_() for name, tensor in model.parameters.items()}
        output = torch.func.functional_call(model.module, parameters, (image.reshape(1, 1, 12, 12),))
        loss = torch.nn.functional.cross_entropy(output, torch.tensor([1]))
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        pairs = list(zip(gradients, problem.targets, strict=True))[1:]
        expected = torch.stack([(0.5 * gradient - target[0]).abs().sum() for gradient, target in pairs]).sum() / 0.5
        assert float(found) == pytest.approx(float(expected.detach()), rel=1e-6)
        (slope,) = torch.autograd.grad(expected, image)
        torch.testing.assert_close(derivative, slope, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe(update="delta", learning_rate=0.1, weight_decay=0.05)], ids=["gradient", "decay"]
)
def test_an_attacker_who_knows_a_transform_finds_the_image_where_the_objective_is_zero(
    recipe: Recipe, model: GlobalModel
) -> None:
    image = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(3))
    seen = observed(model, image, recipe, True, Composed((Halved(), GaussianNoise(1e-3))))
    attack = GradInv(distance="likelihood", iterations=250, total_variation=0.0, precision="float64")
    (found,) = attack.reconstruct([seen], [torch.Generator().manual_seed(0)])
    assert isinstance(found, Reconstruction)
    (blind,) = attack.reconstruct(
        [observed(model, image, recipe, True, GaussianNoise(1e-3))], [torch.Generator().manual_seed(0)]
    )
    assert isinstance(blind, Reconstruction)
    assert found.objective < 0.2 * blind.objective
    errors = [float((one.images - image).abs().mean()) for one in (found, blind)]
    assert errors[0] < 0.7 * errors[1]

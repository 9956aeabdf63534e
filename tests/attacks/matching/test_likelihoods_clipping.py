"""Attackers who know clipping, DP-SGD and local differential privacy, beside closed forms and naive attackers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from medpfl.attacks.gradinv import GradInv
from medpfl.attacks.matching.gradients import Layout, Method, matching_objective
from medpfl.attacks.matching.likelihoods import NotCombined, View, likelihood, why_no_likelihood
from medpfl.attacks.matching.likelihoods.clipping import inside_steps
from medpfl.attacks.matching.priors import no_prior
from medpfl.attacks.matching.problem import build_problem
from medpfl.core.domain import Batch, GlobalModel, Knowledge, Observation, Reconstruction
from medpfl.core.functional import psnr
from medpfl.core.mechanisms import Clipped, ClippedSteps, Composed, GaussianNoise, Mechanism, ThreeValues
from medpfl.core.recipes import Recipe
from medpfl.defenses import DPSGD, Clip, Composition, Defense, FedSDP, Gaussian, LocalDP
from medpfl.federation.client import client_step

SHAPE = (1, 12, 12)


@pytest.fixture
def model(make_model: Any, sigmoid_lenet: Any) -> GlobalModel:
    result: GlobalModel = make_model(sigmoid_lenet(), SHAPE)
    return result


def batch_of(count: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.rand((count, *SHAPE), generator=generator, dtype=torch.float64), torch.arange(count) % 3)


def gradients_of(model: GlobalModel, batch: Batch) -> list[dict[str, Tensor]]:
    """Every image's gradient in float64, one after the other."""
    alone = [Batch(batch.images[k : k + 1], batch.targets[k : k + 1]) for k in range(len(batch))]
    return [dict(client_step(model, one, Recipe(precision="float64"))[0].trainable) for one in alone]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def value_at(
    model: GlobalModel, batch: Batch, recipe: Recipe, defense: Defense, sent: Any, method: Method = "auto"
) -> float:
    """The attacker's objective at the images themselves, without prior."""
    mechanism = defense.mechanism()
    observation = Observation(model, sent, recipe, "honest_server", Knowledge(defense=mechanism))
    hooks = inside_steps(mechanism, recipe, len(batch))
    problem = build_problem([observation], "float64", defended=True, hooks=hooks)
    view = View(problem.names, problem.targets, model, recipe, len(batch))
    likely = likelihood(mechanism, view)
    layout = Layout(tuple(batch.images.shape), ())
    objective = matching_objective(
        problem,
        layout,
        batch.targets[None],
        distance=likely.matching(),
        weights=likely.tensor_weights(problem.names)[None],
        prior=no_prior,
        method=method,
    )
    values, derivative = objective(batch.images.reshape(1, -1).double(), torch.zeros(1, dtype=torch.int64))
    assert bool(torch.isfinite(derivative).all())
    return float(values)


@pytest.mark.parametrize("kind", ["gradient", "delta", "weights"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_candidate_is_clipped_as_the_client_was_before_noise_is_weighed(
    kind: Any, norm: Any, model: GlobalModel
) -> None:
    recipe = Recipe(update=kind, batch_size=2, learning_rate=0.5, precision="float64")
    batch = batch_of(2)
    defense = Composition((Clip(bound=0.1, norm=norm), Gaussian(std=0.02)))
    sent, _ = client_step(model, batch, recipe, hooks=defense, generator=torch.Generator().manual_seed(1))
    mean = joined([sum(parts) / 2 for parts in zip(*(one.values() for one in gradients_of(model, batch)), strict=True)])
    change = mean * (1.0 if kind == "gradient" else -0.5)
    length = float(torch.linalg.vector_norm(change, ord=2 if norm == "l2" else 1))
    assert length > 0.1
    seen = joined(
        [tensor - (model.parameters[name] if kind == "weights" else 0) for name, tensor in sent.trainable.items()]
    )
    likely = torch.distributions.Normal(change * 0.1 / length, 0.02).log_prob(seen).sum()  # type: ignore[no-untyped-call]
    constant = -len(seen) * math.log(0.02 * math.sqrt(2 * math.pi))
    assert value_at(model, batch, recipe, defense, sent) == pytest.approx(float(constant - likely), rel=1e-6)


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("method", ["loop", "vmap"])
def test_each_image_of_a_candidate_is_clipped_inside_the_forward_model(
    count: int, per_tensor: bool, method: Method, model: GlobalModel
) -> None:
    recipe, batch = Recipe(batch_size=count, precision="float64"), batch_of(count)
    defense = DPSGD(bound=0.2, noise_multiplier=0.5, clipping="per_tensor" if per_tensor else "flat")
    sent, _ = client_step(model, batch, recipe, hooks=defense, generator=torch.Generator().manual_seed(1))
    total = torch.zeros(sum(tensor.numel() for tensor in model.parameters.values()), dtype=torch.float64)
    for gradient in gradients_of(model, batch):
        groups = [[one] for one in gradient.values()] if per_tensor else [list(gradient.values())]
        bound = 0.2 / math.sqrt(len(gradient)) if per_tensor else 0.2
        total += joined(
            [tensor * min(1.0, bound / float(joined(group).norm())) for group in groups for tensor in group]
        )
    std = 0.5 * 0.2 / count
    expected = ((joined(list(sent.trainable.values())) - total / count) / std).square().sum() / 2
    assert value_at(model, batch, recipe, defense, sent, method) == pytest.approx(float(expected), rel=1e-6)


def test_noise_of_several_steps_is_that_of_their_sum(model: GlobalModel) -> None:
    """The residuals of many rounds at the true images have the size that the likelihood supposes."""
    recipe = Recipe(update="delta", batch_size=1, local_steps=3, learning_rate=1e-3, precision="float64")
    defense, batch = DPSGD(bound=0.2, noise_multiplier=1.5, sampling="recipe"), batch_of(3)
    entries = sum(tensor.numel() for tensor in model.parameters.values())
    found = []
    for seed in range(5):
        sent, _ = client_step(model, batch, recipe, hooks=defense, generator=torch.Generator().manual_seed(seed))
        found.append(value_at(model, batch, recipe, defense, sent) / entries)
    assert sum(found) / 5 == pytest.approx(0.5, rel=0.05)


def test_three_values_are_weighed_by_their_probabilities(model: GlobalModel) -> None:
    for kind in ("gradient", "weights"):
        recipe = Recipe(update=kind, learning_rate=0.5, precision="float64")
        defense, batch = LocalDP(epsilon=1.5, length=0.05), batch_of(1)
        sent, _ = client_step(model, batch, recipe, hooks=defense, generator=torch.Generator().manual_seed(1))
        change = joined(list(gradients_of(model, batch)[0].values())) * (1.0 if kind == "gradient" else -0.5)
        before = model.parameters if kind == "weights" else {}
        seen = joined([tensor - before.get(name, torch.zeros(1)) for name, tensor in sent.trainable.items()])
        grown = math.exp(1.5)
        expected = 0.0
        for one, shown in zip(change.tolist(), seen.tolist(), strict=True):
            inside = min(max(one, -0.025), 0.025) * math.copysign(1.0, shown)
            if abs(shown) > 1e-6:
                odds = inside * (grown - 1) / (0.05 * (grown + 2)) + (grown + 1) / (2 * (grown + 2))
                expected -= math.log(odds)
        assert value_at(model, batch, recipe, defense, sent) == pytest.approx(expected, rel=1e-6)


def test_a_withheld_recipe_hides_the_batch_size_that_noise_is_divided_by(model: GlobalModel) -> None:
    reason = why_no_likelihood(ClippedSteps(1.0, 1.0), model, None, 2)
    assert reason is not None
    assert "withheld recipe" in reason
    targets = tuple(torch.zeros_like(tensor)[None] for tensor in model.parameters.values())
    view = View(tuple(model.parameters), targets, model, Recipe())
    with pytest.raises(NotCombined, match="put the noise last"):
        likelihood(Composed((GaussianNoise(1.0), Clipped(1.0))), view)


@pytest.mark.parametrize(
    ("mechanism", "recipe", "examples", "played"),
    [
        (ClippedSteps(1.0, 1.0), Recipe(), 1, False),
        (ClippedSteps(1.0, 1.0), Recipe(batch_size=2), 2, True),
        (Composed((ClippedSteps(1.0, 1.0), Clipped(1.0))), Recipe(batch_size=2), 2, True),
        (Clipped(1.0), Recipe(batch_size=2), 2, False),
        (None, Recipe(batch_size=2), 2, False),
    ],
)
def test_local_steps_are_simulated_only_where_something_happens_inside(
    mechanism: Mechanism | None, recipe: Recipe, examples: int, played: bool
) -> None:
    assert inside_steps(mechanism, recipe, examples).clips_per_example == played


def attacked(model: GlobalModel, recipe: Recipe, defense: Defense, sent: Any, knows: bool) -> Reconstruction:
    mechanism = defense.mechanism() if knows else None
    observation = Observation(
        model, sent, recipe, "honest_server", Knowledge(defense=mechanism, labels=torch.tensor([1]))
    )
    attack = GradInv(distance="likelihood", iterations=250, total_variation=0.0, restarts=1, labels="given")
    (result,) = attack.reconstruct([observation], [torch.Generator().manual_seed(0)])
    assert isinstance(result, Reconstruction), result
    return result


@pytest.mark.parametrize(
    "defense",
    [
        Composition((Clip(bound=0.05), Gaussian(std=1e-5))),
        FedSDP(bound=0.05, noise_multiplier=2e-4),
        DPSGD(bound=0.05, noise_multiplier=2e-4),
    ],
)
def test_who_knows_the_bound_sees_more_than_who_takes_the_update_for_a_gradient(
    defense: Defense, model: GlobalModel
) -> None:
    image = Batch(batch_of(1).images, torch.tensor([1]))
    recipe = Recipe(precision="float64")
    sent, _ = client_step(model, image, recipe, hooks=defense, generator=torch.Generator().manual_seed(2))
    informed, naive = (attacked(model, recipe, defense, sent, knows).images.double() for knows in (True, False))
    ours, theirs = (float(psnr(found, image.images)) for found in (informed, naive))
    assert ours > theirs + 5.0
    assert ours > 18.0


def test_clipping_alone_hides_nothing_from_anybody(model: GlobalModel) -> None:
    """The output error that the update shows is as short as the rest, so every attacker sees through it."""
    image, recipe, defense = Batch(batch_of(1).images, torch.tensor([1])), Recipe(precision="float64"), Clip(bound=0.05)
    sent, _ = client_step(model, image, recipe, hooks=defense)
    for knows in (True, False):
        found = attacked(model, recipe, defense, sent, knows).images.double()
        assert float(psnr(found, image.images)) > 40.0


@pytest.mark.parametrize("epsilon", [4.0])
def test_local_dp_is_read_by_its_own_probabilities(epsilon: float, model: GlobalModel) -> None:
    image = Batch(batch_of(1).images, torch.tensor([1]))
    recipe, defense = Recipe(precision="float64"), LocalDP(epsilon=epsilon, length=0.2)
    sent, _ = client_step(model, image, recipe, hooks=defense, generator=torch.Generator().manual_seed(2))
    found = attacked(model, recipe, defense, sent, True)
    truth = value_at(model, image, recipe, defense, sent)
    assert found.objective < truth * 1.05


def test_known_defenses_can_be_played_through() -> None:
    from medpfl.attacks.known_defense import known_defense

    clip, noise = Clip(bound=2.0, norm="l1"), Gaussian(std=0.3)
    assert known_defense(Composition((clip, noise)).mechanism()) == Composition((clip, noise))
    assert known_defense(DPSGD(clipping="per_tensor").mechanism()) == DPSGD(clipping="per_tensor")
    assert known_defense(LocalDP().mechanism()) == LocalDP()
    assert known_defense(Composed((Clipped(1.0), Mechanism()))).mechanism() == known_defense(None).mechanism()
    assert known_defense(replace(ThreeValues(1.0, 2.0), epsilon=3.0)) == LocalDP(epsilon=3.0, length=2.0)

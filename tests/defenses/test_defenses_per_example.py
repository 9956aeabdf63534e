"""DP-SGD and Fed-CDP: clipped sums, noise, sampling, empty batches, beside Opacus, micro-batches and plain loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from medpfl.core.domain import Batch, ClientState, GlobalModel, Tensors, Update
from medpfl.core.errors import SpecError
from medpfl.core.guarantees import Release
from medpfl.core.recipes import Recipe
from medpfl.core.tasks import SingleLabel
from medpfl.defenses import DPSGD, Composition, FedCDP, GroupNorm
from medpfl.defenses.clipping import clipped_sum
from medpfl.federation.client import client_step, drawn_steps
from medpfl.models import prepare

CLASSES = 3


def net(seed: int = 0) -> nn.Sequential:
    """Convolution, dense layers, no batch norm."""
    torch.manual_seed(seed)
    layers = (nn.Conv2d(1, 4, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return nn.Sequential(*layers).double()


def prepared(module: nn.Module) -> GlobalModel:
    return prepare(module, name="small", image_shape=(1, 8, 8), task=SingleLabel(CLASSES)).to(torch.float64)


def batch_of(count: int) -> Batch:
    generator = torch.Generator().manual_seed(count)
    images = torch.rand((count, 1, 8, 8), generator=generator, dtype=torch.float64)
    return Batch(images, torch.randint(0, CLASSES, (count,), generator=generator))


def looped(module: nn.Module, batch: Batch, bound: float, per_tensor: bool = False) -> list[Tensor]:
    """Sum of clipped gradients, image by image."""
    total = [torch.zeros_like(parameter) for parameter in module.parameters()]
    for image, target in zip(batch.images, batch.targets, strict=True):
        module.zero_grad()
        nn.functional.cross_entropy(module(image[None]), target[None]).backward()  # type: ignore[no-untyped-call]
        parameters = list(module.parameters())
        for group in [[one] for one in parameters] if per_tensor else [parameters]:
            most = bound / math.sqrt(len(parameters)) if per_tensor else bound
            norm = math.sqrt(sum(float(one.grad.square().sum()) for one in group if one.grad is not None))
            for one in group:
                assert one.grad is not None
                one.grad *= min(1.0, most / norm)
        total = [
            one + parameter.grad for one, parameter in zip(total, parameters, strict=True) if parameter.grad is not None
        ]
    return total


@pytest.mark.parametrize("bound", [0.3, 1e6])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_without_noise_it_is_the_sum_of_clipped_gradients_over_the_batch_size(bound: float, per_tensor: bool) -> None:
    module, batch = net(), batch_of(5)
    defense = DPSGD(
        bound=bound, noise_multiplier=0.0, clipping="per_tensor" if per_tensor else "flat", sampling="recipe"
    )
    sent, _ = client_step(prepared(module), batch, Recipe(batch_size=5, precision="float64"), hooks=defense)
    for tensor, expected in zip(sent.trainable.values(), looped(module, batch, bound, per_tensor), strict=True):
        torch.testing.assert_close(tensor, expected / 5, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_clipped_sums_are_those_of_opacus(per_tensor: bool) -> None:
    opacus = pytest.importorskip("opacus")
    module, batch, bound, noise = net(), batch_of(6), 0.2, 1.5
    wrapped = opacus.GradSampleModule(net())
    kind = "per_layer" if per_tensor else "flat"
    optimizer_class = opacus.optimizers.get_optimizer_class(clipping=kind, distributed=False)
    tensors = len(list(module.parameters()))
    optimizer = optimizer_class(
        torch.optim.SGD(wrapped.parameters(), lr=1.0),
        noise_multiplier=noise,
        max_grad_norm=[bound / math.sqrt(tensors)] * tensors if per_tensor else bound,
        expected_batch_size=4,
    )
    nn.functional.cross_entropy(wrapped(batch.images), batch.targets).backward()  # type: ignore[no-untyped-call]
    before = [parameter.detach().clone() for parameter in wrapped.parameters()]
    optimizer.pre_step()
    summed = [parameter.summed_grad / 4 for parameter in wrapped.parameters()]
    optimizer.original_optimizer.step()
    opacus_noise = torch.cat(
        [
            (old - new.detach() - mean).flatten()
            for old, new, mean in zip(before, wrapped.parameters(), summed, strict=True)
        ]
    )

    recipe = Recipe(batch_size=4, precision="float64")
    clipping: Any = "per_tensor" if per_tensor else "flat"
    quiet = DPSGD(bound=bound, noise_multiplier=0.0, clipping=clipping, sampling="recipe")
    clean, _ = client_step(prepared(module), batch, recipe, hooks=quiet)
    for tensor, expected in zip(clean.trainable.values(), summed, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-7)
    loud, _ = client_step(prepared(module), batch, recipe, hooks=replace(quiet, noise_multiplier=noise))
    ours = torch.cat([(loud.trainable[name] - clean.trainable[name]).flatten() for name in clean.trainable])
    std = noise * bound / 4
    assert float(opacus_noise.std()) == pytest.approx(std, rel=0.12)
    assert float(ours.std()) == pytest.approx(std, rel=0.12)
    assert scipy.stats.kstest((ours / std).numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("defense", [DPSGD(bound=0.5, noise_multiplier=3.0), FedCDP(bound=0.5, noise_multiplier=3.0)])
def test_noise_is_drawn_once_and_does_not_depend_on_how_many_images_came(count: int, defense: DPSGD) -> None:
    shapes = {"weight": (300, 40), "bias": (500,)}
    generator = torch.Generator().manual_seed(1)
    gradients = {
        name: torch.randn((count, *shape), generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }
    recipe = Recipe(batch_size=8)
    sent = defense.per_example(gradients, recipe, torch.Generator().manual_seed(7))
    quiet = replace(defense, noise_multiplier=0.0).per_example(gradients, recipe, torch.Generator())
    noise = torch.cat([(sent[name] - quiet[name]).flatten() for name in shapes]) * 8
    assert scipy.stats.kstest(noise.numpy(), scipy.stats.norm(0, 1.5).cdf).pvalue > 1e-3
    other = defense.per_example(
        {name: tensor[:0] for name, tensor in gradients.items()}, recipe, torch.Generator().manual_seed(7)
    )
    alone = torch.cat([other[name].flatten() for name in shapes]) * 8
    torch.testing.assert_close(noise, alone, rtol=1e-9, atol=1e-12)


@given(st.integers(1, 6), st.floats(1e-3, 1e3), st.floats(1e-6, 1e6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_one_more_image_moves_the_sum_by_the_bound_at_most(
    count: int, bound: float, size: float, per_tensor: bool
) -> None:
    generator = torch.Generator().manual_seed(count)
    shapes = {"weight": (4, 3), "bias": (4,)}
    gradients: Tensors = {
        name: size * torch.randn((count, *shape), generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    with_all = clipped_sum(gradients, bound, per_tensor)
    without = clipped_sum({name: tensor[:-1] for name, tensor in gradients.items()}, bound, per_tensor)
    moved = torch.cat([(with_all[name] - without[name]).flatten() for name in shapes]).norm()
    assert float(moved) <= bound * (1 + 1e-9)


def test_a_gradient_that_is_not_finite_is_never_clipped_into_a_finite_one() -> None:
    for broken in (float("nan"), float("inf")):
        gradients = {"weight": torch.ones(2, 3), "bias": torch.ones(2, 4)}
        gradients["weight"][0, 1] = broken
        found = clipped_sum(gradients, 1.0)
        assert all(bool(torch.isnan(tensor).any()) for tensor in found.values()) or math.isinf(broken)
        assert not bool(torch.isfinite(found["weight"]).all())


def test_it_is_ordinary_sgd_with_a_fixed_divisor_without_bound_and_noise() -> None:
    model, batch = prepared(net()), batch_of(4)
    recipe = Recipe(update="delta", batch_size=2, local_steps=2, epochs=2, momentum=0.5, precision="float64")
    defense = DPSGD(bound=math.inf, noise_multiplier=0.0, sampling="recipe")
    defended, _ = client_step(model, batch, recipe, hooks=defense)
    plain, _ = client_step(model, batch, recipe)
    for name, tensor in plain.trainable.items():
        torch.testing.assert_close(defended.trainable[name], tensor, rtol=1e-9, atol=1e-12)
    short, _ = client_step(model, batch_of(1), Recipe(batch_size=2, precision="float64"), hooks=defense)
    whole, _ = client_step(model, batch_of(1), Recipe(precision="float64"))
    for name, tensor in whole.trainable.items():
        torch.testing.assert_close(short.trainable[name], tensor / 2, rtol=1e-9, atol=1e-12)


def test_clipping_in_micro_batches_gives_the_same_sum() -> None:
    module, batch = net(), batch_of(7)
    one_by_one = prepared(module)
    pieces = [Batch(batch.images[a:b], batch.targets[a:b]) for a, b in ((0, 3), (3, 4), (4, 7))]
    defense = DPSGD(bound=0.1, noise_multiplier=0.0, sampling="recipe")
    recipe = Recipe(batch_size=7, precision="float64")
    sums = [client_step(one_by_one, piece, recipe, hooks=defense)[0].trainable for piece in pieces]
    whole, _ = client_step(one_by_one, batch, recipe, hooks=defense)
    for name, tensor in whole.trainable.items():
        torch.testing.assert_close(sum(part[name] for part in sums), tensor, rtol=1e-9, atol=1e-12)


def test_poisson_sampling_draws_every_image_on_its_own() -> None:
    recipe = Recipe(update="delta", batch_size=3, local_steps=4, epochs=500)
    steps = drawn_steps(batch_of(12), recipe, DPSGD(), torch.Generator().manual_seed(0))
    assert len(steps) == 2000
    joined = np.zeros((len(steps), 12))
    for row, places in enumerate(steps):
        joined[row, places.numpy()] = 1
        assert len(set(places.tolist())) == len(places)
    assert scipy.stats.binomtest(int(joined.sum()), joined.size, 0.25).pvalue > 1e-3
    sizes = joined.sum(axis=1)
    assert (sizes == 0).any()
    expected = scipy.stats.binom(12, 0.25)
    observed = [int((sizes == count).sum()) for count in range(6)]
    counts = [*observed, len(sizes) - sum(observed)]
    shares = [*expected.pmf(range(6)), expected.sf(5)]
    assert scipy.stats.chisquare(counts, [len(sizes) * share for share in shares]).pvalue > 1e-3
    assert abs(np.corrcoef(joined[:-1].ravel(), joined[1:].ravel())[0, 1]) < 0.02


def test_an_empty_step_still_adds_noise() -> None:
    recipe = Recipe(update="delta", batch_size=1, local_steps=2, learning_rate=1.0, precision="float64")
    batch = batch_of(2)
    seed = next(
        seed
        for seed in range(50)
        if all(len(step) == 0 for step in drawn_steps(batch, recipe, DPSGD(), torch.Generator().manual_seed(seed)))
    )
    sent, _ = client_step(prepared(net()), batch, recipe, hooks=DPSGD(), generator=torch.Generator().manual_seed(seed))
    entries = torch.cat([tensor.flatten() for tensor in sent.trainable.values()])
    assert sent.examples == 2
    assert float(entries.std()) == pytest.approx(math.sqrt(2.0), rel=0.15)


def test_the_history_counts_logical_steps() -> None:
    recipe = Recipe(update="delta", batch_size=8, local_steps=4, epochs=3)
    guarantee = DPSGD(noise_multiplier=1.3).guarantee(recipe, 32)
    assert guarantee is not None
    assert (guarantee.unit, guarantee.neighbors) == ("image", "add_or_remove")
    assert guarantee.releases == (Release("gaussian", 1.3, sampling_rate=0.25, count=12),)
    in_order = DPSGD(noise_multiplier=1.3, sampling="recipe").guarantee(recipe, 32)
    assert in_order is not None
    assert in_order.releases == (Release("gaussian", 1.3, sampling_rate=1.0, count=3),)
    assert DPSGD(noise_multiplier=0.0).guarantee(recipe, 32) is None
    gradient = DPSGD().guarantee(Recipe(batch_size=8), 8)
    assert gradient is not None
    assert gradient.releases[0].sampling_rate == 1.0


def test_fed_cdp_lowers_its_bound_over_the_rounds() -> None:
    defense = FedCDP(bound=6.0, last_bound=2.0, rounds=4, noise_multiplier=0.0)
    model, batch, recipe = prepared(net()), batch_of(1), Recipe(precision="float64")
    lengths = []
    for number in (0, 2, 9):
        scaled = replace(model, parameters={name: 100 * tensor for name, tensor in model.parameters.items()})
        sent, _ = client_step(scaled, batch, recipe, hooks=defense, state=ClientState(rounds=number))
        biggest = max(float(tensor.norm()) for tensor in sent.trainable.values())
        lengths.append(biggest * math.sqrt(len(model.parameters)))
    assert lengths == pytest.approx([6.0, 4.0, 2.0], rel=1e-6)


def batch_normalized() -> GlobalModel:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))
    return prepared(module)


@pytest.mark.parametrize("defense", [DPSGD(), FedCDP()])
def test_batch_norm_in_train_mode_is_refused_and_group_norm_offered(defense: DPSGD) -> None:
    model, recipe = batch_normalized(), Recipe(batch_size=2, batch_norm="train", precision="float64")
    with pytest.raises(SpecError, match="compose group_norm before"):
        client_step(model, batch_of(2), recipe, hooks=defense)
    in_eval_mode = replace(recipe, batch_norm="eval")
    assert client_step(model, batch_of(2), in_eval_mode, hooks=defense)[0].examples == 2
    fixed = Composition((GroupNorm(), defense))
    sent, _ = client_step(fixed.model(model), batch_of(2), recipe, hooks=fixed)
    assert not sent.buffers
    assert bool(torch.isfinite(next(iter(sent.trainable.values()))).all())


def test_accumulation_is_refused() -> None:
    assert "accumulation: 2" in DPSGD().refusals(prepared(net()), Recipe(batch_size=2, accumulation=2))[0]


def test_no_bound_leaves_nothing_to_calibrate_noise_to() -> None:
    with pytest.raises(ValidationError, match="calibrate"):
        DPSGD(bound=math.inf)


def test_buffers_are_sent_as_they_were_received() -> None:
    model = batch_normalized()
    update = Update(
        "delta", model.parameters, {key: tensor + 1 for key, tensor in model.buffers.items()}, model.counters, 1
    )
    sent, _ = DPSGD().update(update, model, ClientState(), torch.Generator())
    assert all(torch.equal(sent.buffers[key], tensor) for key, tensor in model.buffers.items())


def test_clipping_is_differentiable_where_the_gradient_is_zero() -> None:
    image = torch.zeros(1, 4, requires_grad=True)
    total = clipped_sum({"weight": image * 2}, 1.0)["weight"].sum()
    (derivative,) = torch.autograd.grad(total, image)
    assert bool(torch.isfinite(derivative).all())

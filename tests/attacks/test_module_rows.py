"""Rows of a leakage module's gradient are read in single precision and say what differences in double precision say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from crafted_rounds import Round, attacked
from torch import Tensor

from medpfl.attacks.bin_readout import read_rows
from medpfl.attacks.front import BIAS, WEIGHT
from medpfl.attacks.medleak import MedLeak
from medpfl.attacks.module_update import module_gradients, sent_bins
from medpfl.core.domain import Recipe
from medpfl.data.dataset import Dataset


def in_double_precision(found: Round, recipe: Recipe, queries: int) -> tuple[Tensor, Tensor]:
    """What each bin put into weights (K, D) and biases (K,), from the definition of an SGD step."""
    gradients = []
    for name in (WEIGHT, BIAS):
        sent, got = (
            found.broadcast.model(0).parameters[name].double(),
            found.observation.update.trainable[name].double(),
        )
        if recipe.update == "gradient":
            gradient = got
        else:
            change = got - sent if recipe.update == "weights" else got
            gradient = -change / recipe.learning_rate - recipe.weight_decay * sent
        per_query = gradient.reshape(queries, -1, *gradient.shape[1:])
        after = torch.cat([per_query[:, 1:], torch.zeros_like(per_query[:, :1])], dim=1)
        gradients.append((per_query - after).flatten(0, 1))
    return gradients[0], gradients[1]


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(update="gradient"),
        Recipe(update="delta", learning_rate=0.1, weight_decay=0.01),
        Recipe(update="weights", learning_rate=0.1),
        Recipe(update="weights", learning_rate=0.1, weight_decay=0.1),
        Recipe(update="weights", learning_rate=0.1, precision="bfloat16"),
    ],
    ids=lambda recipe: f"{recipe.update}-{recipe.precision}-{recipe.weight_decay}",
)
def test_ratios_are_those_of_double_precision(recipe: Recipe, queries: int, films: Dataset) -> None:
    found = attacked(MedLeak(bins=64, scale=1e-3, gain=10.0, queries=queries), films, 16, recipe=recipe)
    (gradient,), bins = module_gradients(found.observation, "separate"), sent_bins(found.broadcast)
    weight, bias = in_double_precision(found, recipe, queries)
    full = (bias.abs() > 0.01 * bias.abs().max()).nonzero().flatten()
    assert len(full) >= 5
    shown = torch.empty(len(full), weight.shape[1])
    gradient.ratios(full, bias[full], bins, shown)
    summed = bias.reshape(queries, -1).flip(1).cumsum(1).flip(1).flatten()
    assert torch.allclose(gradient.bias, summed, rtol=1e-9, atol=1e-12)
    assert torch.allclose(shown.double(), weight[full] / bias[full, None], rtol=0, atol=2e-6)


def test_rounding_is_taken_off_and_what_is_no_image_is_left_out() -> None:
    shown = torch.tensor([[-5e-5, 0.5, 1.0], [0.2, 0.3, 3.0], [0.0, float("nan"), 0.0], [0.9, -0.01, 0.1]])

    def ratios(units: Tensor, found: Tensor) -> None:
        found.copy_(shown[units])

    bias = torch.tensor([4.0, 3.0, 2.0, 1.0])
    whole = read_rows(ratios, bias, torch.zeros(4), torch.ones(4), (1, 1, 3), 4)
    assert whole.bins.tolist() == [0, 3]
    assert not whole.inside
    assert torch.equal(whole.images[1].flatten(), shown[3])
    first = read_rows(ratios, bias, torch.zeros(4), torch.ones(4), (1, 1, 3), 1)
    assert first.inside
    assert first.images.flatten().tolist() == [0.0, 0.5, 1.0]


def test_a_module_whose_units_differ_says_so(films: Dataset) -> None:
    half = Recipe(update="weights", learning_rate=0.1, precision="bfloat16")
    for recipe, alike in ((replace(half, precision="float32"), True), (half, False)):
        found = attacked(MedLeak(bins=32, scale=1e-2, gain=10.0, queries=1), films, 4, recipe=recipe)
        rows = found.broadcast.model(0).parameters[WEIGHT]
        assert bool((rows == rows[0]).all()) == alike == bool(found.broadcast.secret["alike"])

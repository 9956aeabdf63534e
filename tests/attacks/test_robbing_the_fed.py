"""Robbing the Fed against what can be read at most: the images that are really alone in their bin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import scipy.stats
import torch
from crafted_rounds import SGD, Round, alone_between, attacked, lenet
from torch import Tensor

from medpfl.attacks.crafted import ServerView
from medpfl.attacks.imprint import fitted_edges
from medpfl.attacks.linear_queries import linear_query
from medpfl.attacks.robbing_the_fed import RobbingTheFed
from medpfl.core.domain import Recipe
from medpfl.core.errors import AttackFailure
from medpfl.data.dataset import Dataset
from medpfl.federation import Channel, Plain, SecAggPlus, SecureSum

LOSS = 0.02
"""Share of the images alone in their bin that may get lost; one image more where a mixture of two takes its place."""

GRADIENT = Recipe(update="gradient")


def alone(found: Round) -> int:
    """How many private images are the only ones between two edges of the query, computed pixel by pixel."""
    secret = found.broadcast.secret
    return alone_between(secret["edges"], (found.private.double().flatten(1) * secret["query"]).sum(dim=1))


def check(found: Round) -> None:
    assert alone(found) >= 10
    assert found.recovered >= (1 - LOSS) * alone(found) - 1
    assert len(found.result.images) <= len(found.private)


@pytest.mark.parametrize("variant", ["cumulative", "sparse"])
@pytest.mark.parametrize(
    "channel", [Plain(), SecureSum(clients=3), SecAggPlus(clients=3)], ids=["plain", "sum", "secagg"]
)
def test_nearly_all_images_alone_in_their_bin_come_back(variant: Any, channel: Channel, films: Dataset) -> None:
    check(attacked(RobbingTheFed(variant=variant), films, 16, channel=channel))


@pytest.mark.parametrize("variant", ["cumulative", "sparse"])
@pytest.mark.parametrize("query", ["dct", "random"])
def test_other_queries_and_colors(variant: Any, query: Any, skin: Dataset) -> None:
    found = attacked(RobbingTheFed(variant=variant, query=query, bins=256), skin, 32)
    check(found)
    assert found.result.images.shape[1:] == (3, 28, 28)


@pytest.mark.parametrize("variant", ["cumulative", "sparse"])
def test_the_same_on_pneumoniamnist(variant: Any, pneumonia: Dataset) -> None:
    check(attacked(RobbingTheFed(variant=variant), pneumonia, 64))


@pytest.mark.parametrize("variant", ["cumulative", "sparse"])
def test_the_share_that_comes_back_is_multinomial(variant: Any, films: Dataset) -> None:
    """N images fall into K bins one by one. Weighing all histograms alike, as the public code's figure does, would
    give K (K - 1) / ((N + K - 1) (N + K - 2)) instead."""
    bins, images, attack = 128, 64, RobbingTheFed(bins=128, variant=variant, scale=1e-4)
    rounds = [attacked(attack, films, images, recipe=GRADIENT, seed=seed) for seed in range(6)]
    share = sum(found.recovered for found in rounds) / (images * len(rounds))
    assert share == pytest.approx((1 - 1 / bins) ** (images - 1), abs=0.06)
    assert share > bins * (bins - 1) / ((images + bins - 1) * (images + bins - 2)) + 0.06


@pytest.mark.parametrize("variant", ["cumulative", "sparse"])
def test_the_darkest_and_the_brightest_bin_are_read_too(variant: Any, films: Dataset) -> None:
    extremes = torch.stack([torch.zeros(1, 28, 28), torch.ones(1, 28, 28), films.images[0]])
    data = replace(films, images=torch.cat([extremes, films.images[3:]]))
    attack = RobbingTheFed(variant=variant, bins=64, scale=1e-3)
    found = attacked(attack, data, 3, recipe=GRADIENT, places=torch.arange(3))
    assert found.recovered == len(found.result.images) == 3


@pytest.mark.parametrize("query", ["mean", "dct", "random"])
def test_a_sparse_unit_has_a_slope_in_its_own_bin_only(query: Any, films: Dataset) -> None:
    found = attacked(RobbingTheFed(variant="sparse", query=query, bins=32, scale=1e-3), films, 4, recipe=GRADIENT)
    secret, sent = found.broadcast.secret, found.broadcast.model(0)
    for image in films.images[:20]:
        parameters = {name: tensor.clone().requires_grad_() for name, tensor in sent.parameters.items()}
        output, _ = sent.forward(image[None], parameters=parameters)
        bias = torch.autograd.grad(sent.task.loss(output, torch.tensor([0])), parameters["front.first.bias"])[0]
        value = float((image.double().flatten() * secret["query"]).sum())
        inside = [low < value < high for low, high in zip(secret["edges"][:-1], secret["edges"][1:], strict=True)]
        assert bias.ne(0).tolist() == inside


@pytest.mark.parametrize("variant", ["cumulative", "sparse"])
@pytest.mark.parametrize("connection", ["linear", "residual"])
def test_scale_changes_no_output_and_a_residual_model_still_sees_the_image(
    variant: Any, connection: Any, films: Dataset
) -> None:
    attacks = [RobbingTheFed(variant=variant, connection=connection, scale=scale) for scale in (1.0, 1e-6)]
    rounds = [attacked(attack, films, 16, recipe=GRADIENT) for attack in attacks]
    images, order = films.images[:4], torch.randperm(784, generator=torch.Generator().manual_seed(4))
    shuffled = images.flatten(1)[:, order].reshape(images.shape)

    def outputs(found: Round, shown: Tensor) -> Tensor:
        return found.broadcast.model(0).forward(shown)[0]

    torch.testing.assert_close(outputs(rounds[0], images), outputs(rounds[1], images), rtol=1e-3, atol=1e-4)
    moved = float((outputs(rounds[0], images) - outputs(rounds[0], shuffled)).abs().max())
    assert moved > 1e-3 if connection == "residual" else moved < 1e-4
    assert rounds[1].recovered >= (1 - LOSS) * alone(rounds[1])


def test_the_published_block_reads_gradients_and_is_lost_in_quantization_where_the_calibrated_one_is_not(
    films: Dataset,
) -> None:
    published = RobbingTheFed(**RobbingTheFed.presets["published"])
    assert attacked(published, films, 16, recipe=GRADIENT).recovered >= 12
    channel = SecAggPlus(clients=2)
    assert attacked(published, films, 8, channel=channel).recovered <= 2
    check(attacked(RobbingTheFed(quantiles="fitted"), films, 8, channel=channel))


def test_fitted_edges_are_quantiles_of_the_families() -> None:
    values = torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64)
    levels = torch.tensor([0.025, 0.5, 0.9], dtype=torch.float64)
    assert fitted_edges(values, levels, "mean").tolist() == pytest.approx(
        [0.4 - 1.95996 * 0.2, 0.4, 0.4 + 1.28155 * 0.2], abs=1e-5
    )
    laplace = scipy.stats.laplace(loc=0.4, scale=0.2 / 2**0.5)
    assert fitted_edges(values, levels, "dct").tolist() == pytest.approx(laplace.ppf(levels.numpy()).tolist())


def test_queries_measure_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    random = linear_query("random", (3, 8, 8), generator)
    assert float(random.mean()) == pytest.approx(0, abs=1e-12)
    assert float(random.norm()) == pytest.approx(1)
    cosine = linear_query("dct", (1, 16, 16), generator)
    flat = torch.fft.fft(cosine).abs()[:128]
    assert int(flat.argmax()) == 16  # mode 32 has half as many periods
    assert float(cosine.sum()) == pytest.approx(0, abs=1e-12)


def test_what_it_cannot_do_is_refused_with_the_reason(films: Dataset) -> None:
    model = lenet(films, 0)
    assert "adam" in (RobbingTheFed().why_not(model, Recipe(optimizer="adam", update="delta"), "delta", 1) or "")
    assert "recipe is withheld" in (RobbingTheFed().why_not(model, None, "weights", 1) or "")
    assert RobbingTheFed(scale=1e-4).why_not(model, None, "weights", 1) is None
    assert "GiB" in (RobbingTheFed(bins=10**9).why_not(model, SGD, "weights", 1) or "")
    assert "inconsistent_models" not in RobbingTheFed().needs()
    view = ServerView(model, SGD, "weights", Plain(), 1, "malicious_server", frozenset())
    with pytest.raises(AttackFailure, match="auxiliary"):
        RobbingTheFed().prepare(view, torch.Generator())

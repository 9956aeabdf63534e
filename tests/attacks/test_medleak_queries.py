"""Several queries and peeling: most of the images that the closed form of one query leaves mixed come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from crafted_rounds import SGD, Round, lenet
from crafted_rounds import attacked as attacked_round
from torch import Tensor
from torch.nn.functional import interpolate

from medpfl.attacks.medleak import MedLeak
from medpfl.attacks.query_bins import QueryBins, peelable, peelable_shares, query_bins
from medpfl.attacks.span_peeling import SAMPLED, Gradients, read_by_peeling
from medpfl.data.dataset import Dataset
from medpfl.federation import Channel, Plain, SecAggPlus, SecureSum


def attacked(attack: MedLeak, data: Dataset, size: int, **other: Any) -> Round:
    """A round whose images the attack is after are the victim's only, or all."""
    return attacked_round(attack, data, size, sought=1 if attack.mode == "separate" else None, **other)


CHANNELS: list[Any] = [
    pytest.param("separate", Plain(), id="plain"),
    pytest.param("separate", SecAggPlus(clients=3), id="secagg, separate"),
    pytest.param("joint", SecureSum(clients=3), id="secure sum, joint"),
    pytest.param("joint", SecAggPlus(clients=3), id="secagg, joint"),
]


@pytest.mark.parametrize(("mode", "channel"), CHANNELS)
def test_nearly_all_images_come_back_where_one_query_leaves_a_third_mixed(
    mode: Any, channel: Channel, films: Dataset
) -> None:
    """96 images in 192 units: (1 - 1/192)^95 = 0.61 of them are alone in their bin with one query."""
    size = 96 // (channel.client_count if mode == "joint" else 1)
    found = attacked(MedLeak(bins=192, mode=mode), films, size, channel=channel)
    assert len(found.private) == 96
    assert found.recovered >= 0.95 * 96
    assert len(found.result.images) <= 96
    assert found.broadcast.secret["edges"].shape[0] > 1


@pytest.mark.parametrize("patterns", ["smooth", "even", "random", "dct"])
def test_images_that_are_on_no_grid_of_pixel_values_come_back_under_all_patterns(patterns: Any, films: Dataset) -> None:
    """Resized there and back, so that no certificate can rest on 8 bits."""
    smaller = interpolate(films.images, size=(24, 24), mode="bilinear", antialias=True)
    resized = replace(films, images=interpolate(smaller, size=(28, 28), mode="bicubic").clamp(0, 1))
    found = attacked(MedLeak(bins=192, queries=3, patterns=patterns, scale=1e-4), resized, 80)
    assert found.recovered >= 0.95 * 80


def test_where_mean_values_lie_in_clumps_the_evenest_query_spreads_images() -> None:
    """Equal amounts are taken from one color and given to another, so that the mean values show three levels only."""
    generator = torch.Generator().manual_seed(0)
    images = 0.4 + 0.1 * torch.randint(3, (1200, 1, 1, 1), generator=generator).expand(-1, 3, 6, 6).clone()
    moved = 0.3 * (torch.rand((1200, 6, 6), generator=generator) - torch.rand((1200, 1, 1), generator=generator))
    images[:, 0] += moved
    images[:, 2] -= moved
    shares = {}
    for pattern in ("smooth", "even"):
        bins = query_bins(pattern, 1, 256, images[:600], generator)
        parts = torch.split(images[600:], 100)
        shares[pattern] = float(torch.stack([bins.alone(part) for part in parts]).double().mean())
    assert shares["smooth"] < 0.2
    assert shares["even"] == pytest.approx((1 - 1 / 256) ** 99, abs=0.06)


def test_bins_of_unsmoothed_quantiles_hold_equal_numbers_of_the_images_they_are_from(films: Dataset) -> None:
    bins = query_bins("smooth", 1, 16, films.images[:160], torch.Generator(), "empirical")
    assert bins.counts(films.images[:160]).tolist() == [10] * 16


@pytest.mark.parametrize("kind", ["gradient", "delta", "weights"])
def test_every_kind_of_update(kind: Any, films: Dataset) -> None:
    found = attacked(MedLeak(bins=128, queries=3, scale=1e-4), films, 48, recipe=replace(SGD, update=kind))
    assert found.recovered >= 0.9 * 48


def as_asked_for(weight: Tensor, bias: Tensor) -> Gradients:
    """Gradients that are there as a whole."""
    return Gradients(lambda part: weight[:, part], bias, weight.shape[1])


@pytest.mark.parametrize("size", [200, 3 * SAMPLED], ids=["small", "sampled"])
def test_peeling_finds_exactly_what_was_put_into_the_bins_and_its_own_noise_does_not_pile_up(size: int) -> None:
    """Gradients made by hand from random images, with white noise: no error exceeds what single bins would show."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((40, size), generator=generator, dtype=torch.float64)
    errors = torch.randn(40, generator=generator, dtype=torch.float64)
    errors = errors.sign() * (0.5 + errors.abs())
    rows = torch.randn((3, size), generator=generator, dtype=torch.float64) / size
    values = images @ rows.T
    edges = torch.stack(
        [torch.linspace(float(v.min()) - 0.01, float(v.max()), 60, dtype=torch.float64) for v in values.T]
    )
    active = (values.T[:, None, :] > edges[:, :, None]).flatten(0, 1).double()
    noise = 1e-5 * torch.randn((180, size + 1), generator=generator, dtype=torch.float64)
    weight = active @ (errors[:, None] * images) + noise[:, :-1]
    bias = active @ errors + noise[:, -1]
    bins = QueryBins(rows, edges)
    found = read_by_peeling(as_asked_for(weight, bias), bins, (size,), 40)
    told_apart = peelable(bins.bins(values))
    assert int(told_apart.sum()) > int(bins.alone(images).sum()) >= 10
    nearest = (found.images[:, None] - images).abs().amax(dim=2).amin(dim=0)
    assert float(nearest[told_apart].max()) < 4e-4  # single bins: about 4 sqrt(2) * 1e-5 / 0.5 of all entries
    assert len(found.images) <= 40


def test_mixtures_are_not_certified() -> None:
    """All bins hold two images: nothing can be peeled, and what comes back is ranked behind nothing certified."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand((8, 50), generator=generator, dtype=torch.float64)
    rows = torch.randn((2, 50), generator=generator, dtype=torch.float64) / 50
    values = (images @ rows.T).sort(dim=0).values
    edges = torch.stack([torch.cat([v[::2] - 1e-9, v[-1:] + 1.0 + torch.arange(12)]) for v in values.T])
    active = ((images @ rows.T).T[:, None, :] > edges[:, :, None]).flatten(0, 1).double()
    bins = QueryBins(rows, edges)
    assert not bool(bins.alone(images).any())
    found = read_by_peeling(as_asked_for(active @ images, active.sum(dim=1)), bins, (50,), 8)
    if len(found.images):
        assert float((found.images[:, None] - images).abs().amax(dim=2).min()) > 0.05


def drawn(generator: torch.Generator, count: int, images: Tensor) -> QueryBins:
    return query_bins("smooth", count, 128, images, generator)


def test_the_number_of_queries_follows_from_images_and_units(films: Dataset) -> None:
    """One query where images are few or more than the units, three or four where they are half as many."""
    chosen = {}
    for size in (2, 64, 256):
        generator = torch.Generator().manual_seed(0)
        shares = peelable_shares(partial(drawn, generator), 128, films.images, size, generator)
        chosen[size] = max(shares, key=lambda count: shares[count])
        assert shares[1] == pytest.approx((1 - 1 / 128) ** (size - 1), abs=0.05)
        if size == 64:
            assert shares[3] > 0.97
    assert chosen[64] in (3, 4)
    assert chosen[256] == 1


def test_queries_are_uncorrelated_on_the_images_they_were_made_for(
    blobs: Callable[..., Tensor],
) -> None:
    images = blobs(300, (3, 12, 12))
    bins = query_bins("smooth", 4, 64, images, torch.Generator().manual_seed(0))
    correlations = torch.corrcoef(bins.values(images).T)
    torch.testing.assert_close(correlations, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(bins.values(images)[:, 0], images.double().flatten(1).mean(dim=1))
    assert int(bins.counts(images).sum()) == 4 * 300


def test_more_queries_than_units_allow_are_refused(films: Dataset) -> None:
    reason = MedLeak(bins=8, queries=5).why_not(lenet(films, 0), SGD, "weights", 4)
    assert "2 bins each" in (reason or "")

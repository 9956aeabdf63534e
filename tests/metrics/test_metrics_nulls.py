"""Null baselines against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import medpfl.metrics.nulls as nulls_module
from medpfl.core.functional import mse, psnr, ssim
from medpfl.metrics.nulls import null_baselines
from medpfl.metrics.truth import GroundTruth


def stack(count: int, seed: int, channels: int = 1) -> Tensor:
    return torch.rand(count, channels, 12, 13, generator=torch.Generator().manual_seed(seed))


def truth_of(images: Tensor, labels: Tensor) -> GroundTruth:
    return GroundTruth(images, labels, tuple(str(index) for index in range(len(images))))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(9)


@pytest.mark.parametrize("chunk", [10**9, 500, 1])
def test_baselines_agree_with_loops_whatever_the_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nulls_module, "CHUNK_ENTRIES", chunk)
    private, pool = stack(5, 0, 3), stack(23, 1, 3)
    labels, targets = torch.tensor([0, 2, 1, 1, 3]), torch.arange(23) % 3
    found = null_baselines(truth_of(private, labels), pool, targets, generator())
    assert list(found) == ["class_mean", "nearest", "noise"]
    for position, image in enumerate(private):
        members = pool[targets == labels[position]] if labels[position] < 3 else pool
        expected_mean = members.double().mean(0)
        assert torch.allclose(found["class_mean"].images[position].double(), expected_mean, atol=1e-6)
        errors = [float((image.double() - other.double()).square().mean()) for other in pool]
        assert float(found["nearest"].mse[position]) == pytest.approx(min(errors), rel=1e-9)
        assert torch.equal(found["nearest"].images[position], pool[errors.index(min(errors))])
    for scores in found.values():
        assert torch.allclose(scores.psnr, psnr(private, scores.images))
        assert torch.allclose(scores.ssim, ssim(private, scores.images))
        assert torch.allclose(scores.mse, mse(private, scores.images))


def test_noise_is_uniform_and_reproducible() -> None:
    private = stack(64, 0)
    first = null_baselines(
        truth_of(private, torch.zeros(64, dtype=torch.long)), private[:0], torch.zeros(0), generator()
    )
    again = null_baselines(
        truth_of(private, torch.zeros(64, dtype=torch.long)), private[:0], torch.zeros(0), generator()
    )
    noise = first["noise"].images
    assert torch.equal(noise, again["noise"].images)
    assert float(noise.min()) >= 0.0
    assert float(noise.max()) <= 1.0
    assert float(noise.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(noise.var()) == pytest.approx(1 / 12, abs=0.003)


def test_an_empty_null_part_leaves_only_noise() -> None:
    private = stack(2, 0)
    found = null_baselines(truth_of(private, torch.tensor([0, 1])), private[:0], torch.zeros(0), generator())
    assert list(found) == ["noise"]


def test_multi_label_class_means_use_images_with_the_same_labels() -> None:
    private, pool = stack(2, 0), stack(4, 1)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    targets = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    found = null_baselines(truth_of(private, labels), pool, targets, generator())["class_mean"]
    assert torch.allclose(found.images[0], (pool[0] + pool[2]) / 2, atol=1e-6)
    assert torch.allclose(found.images[1], pool.mean(0), atol=1e-6)


def test_nearest_is_an_upper_bound_on_every_image_of_the_null_part() -> None:
    private, pool = stack(3, 0), stack(9, 1)
    found = null_baselines(truth_of(private, torch.zeros(3, dtype=torch.long)), pool, torch.zeros(9), generator())
    for other in pool:
        assert bool((found["nearest"].psnr >= psnr(private, other.expand_as(private)) - 1e-12).all())


def test_a_private_image_in_the_null_part_would_be_seen() -> None:
    private = stack(1, 0)
    pool = torch.cat([stack(3, 1), private])
    found = null_baselines(truth_of(private, torch.tensor([0])), pool, torch.zeros(4), generator())
    assert found["nearest"].psnr.tolist() == [100.0]


def test_volumes_have_baselines_too() -> None:
    private = torch.rand(2, 1, 11, 11, 12, generator=generator())
    found = null_baselines(truth_of(private, torch.tensor([0, 1])), private.flip(0), torch.tensor([0, 1]), generator())
    assert torch.equal(found["nearest"].images, private)
    assert torch.equal(found["class_mean"].images, private.flip(0))

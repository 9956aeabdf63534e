"""The papers' own conventions, and how far they are from an honest number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import metrics
from torch import Tensor

from medpfl.core.errors import SpecError
from medpfl.core.functional import ssim
from medpfl.metrics.legacy import CONVENTIONS, imagenet_normalization, legacy_scores, wrap_to_8_bit

REFERENCE: Any = metrics


def smooth(seed: int, channels: int = 3, size: int = 224) -> Tensor:
    """A smooth image (1, channels, size, size) in [0, 1], as medical images are."""
    coarse = torch.rand(1, channels, 7, 7, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=True) * 0.9 + 0.1


def legacy_ssim(truth: Tensor, other: Tensor, convention: str) -> float:
    return float(legacy_scores(truth, other, convention)[0])


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(5))


def test_range_255_on_normalized_images_rewards_noise(noise: Tensor) -> None:
    truth, unrelated = smooth(0), smooth(1)
    degraded = truth + 0.1 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(6))
    assert abs(float(ssim(truth, noise))) < 0.05
    assert 0.8 < legacy_ssim(truth, noise, "range_255_normalized") < 0.95
    assert legacy_ssim(truth, unrelated, "range_255_normalized") > 0.7
    assert float(ssim(truth, degraded)) < 0.6
    assert legacy_ssim(truth, degraded, "range_255_normalized") > 0.98
    black = legacy_ssim(truth, torch.zeros_like(truth), "range_255_normalized")
    assert 0.2 < black < 0.8
    assert float(ssim(truth, torch.zeros_like(truth))) < 0.01


def test_range_0_stays_near_zero_for_noise_and_is_zero_for_black(noise: Tensor) -> None:
    truth = smooth(0)
    assert abs(legacy_ssim(truth, noise, "range_0")) < 0.05
    assert abs(legacy_ssim(truth, torch.zeros_like(truth), "range_0")) < 1e-3
    assert legacy_ssim(truth, truth, "range_0") == pytest.approx(1.0, abs=1e-6)


def test_range_0_is_undefined_where_both_images_are_empty() -> None:
    truth = smooth(0, 1, 32)
    truth[:, :, :16] = 0.0
    assert np.isnan(legacy_ssim(truth, truth.clone(), "range_0"))
    assert legacy_ssim(truth, truth.clone(), "range_1") == pytest.approx(1.0)


def test_range_1_is_the_project_s_ssim_and_does_not_clamp() -> None:
    truth, other = smooth(0, 1, 32), smooth(1, 1, 32) + 0.5
    values, errors = legacy_scores(truth, other, "range_1")
    expected = REFERENCE.structural_similarity(
        truth[0, 0].double().numpy(),
        other[0, 0].double().numpy(),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1.0,
    )
    assert float(values) == pytest.approx(expected, abs=1e-9)
    assert float(errors) == pytest.approx(float((truth.double() - other.double()).square().mean()))


def test_8_bit_conversion_agrees_with_a_picture_library() -> None:
    values = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray((values[0, 0].numpy() * 255).astype(np.uint8))
    assert torch.equal(wrap_to_8_bit(values)[0, 0], torch.from_numpy(np.asarray(picture) / 255.0))


def test_8_bit_conversion_wraps_outside_the_range() -> None:
    outside = torch.tensor([256 / 255, 257.4 / 255, -1 / 255, -2.5 / 255, 2000 / 255], dtype=torch.float64)
    counts = (wrap_to_8_bit(outside) * 255).round().tolist()
    assert counts == [0, 1, 255, 254, 2000 % 256]


def test_wrapping_turns_a_tiny_overshoot_into_a_large_error() -> None:
    truth = torch.full((1, 1, 16, 16), 1.0)
    overshoot = truth * 1.005
    assert float(legacy_scores(truth, overshoot, "range_1")[1]) < 1e-4
    assert float(legacy_scores(truth, overshoot, "range_1_8bit")[1]) > 0.9


def test_normalized_mse_is_larger_by_the_squared_standard_deviations() -> None:
    truth, other = smooth(0, 3, 32), smooth(1, 3, 32)
    _, errors = legacy_scores(truth, other, "range_255_normalized")
    per_channel = (truth.double() - other.double()).square().mean((0, 2, 3)).numpy()
    assert float(errors) == pytest.approx(float(np.mean(per_channel / np.array([0.229, 0.224, 0.225]) ** 2)), rel=1e-6)
    own = (torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.5, 0.5, 0.5]))
    _, with_own = legacy_scores(truth, other, "range_255_normalized", own)
    assert float(with_own) == pytest.approx(4 * float(per_channel.mean()), rel=1e-6)


def test_grey_images_take_the_mean_of_the_three_normalizations() -> None:
    mean, std = imagenet_normalization(1)
    assert float(mean) == pytest.approx((0.485 + 0.456 + 0.406) / 3)
    assert float(std) == pytest.approx((0.229 + 0.224 + 0.225) / 3)
    truth, other = smooth(0, 1, 32), smooth(1, 1, 32)
    _, errors = legacy_scores(truth, other, "range_255_normalized")
    assert float(errors) == pytest.approx(float((truth.double() - other.double()).square().mean()) / 0.226**2, rel=1e-5)


def test_an_unknown_convention_suggests_the_nearest() -> None:
    truth = smooth(0, 1, 16)
    with pytest.raises(SpecError, match="did you mean 'range_255_normalized'"):
        legacy_scores(truth, truth, "range_255_normalised")


@pytest.mark.parametrize("convention", sorted(CONVENTIONS))
def test_every_convention_gives_one_for_a_copy_and_one_number_per_image(convention: str) -> None:
    truth = torch.cat([smooth(0, 3, 32), smooth(1, 3, 32)]).mul(255).round().div(255)
    values, errors = legacy_scores(truth, truth.clone(), convention)
    assert values.tolist() == pytest.approx([1.0, 1.0], abs=2e-3)
    assert errors.tolist() == pytest.approx([0.0, 0.0], abs=2e-5)

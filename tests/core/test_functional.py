"""PSNR, SSIM, total variation and assignment against scikit-image, plain loops and brute force."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from skimage import data, metrics, transform
from torch import Tensor

from medpfl.core.errors import InputError
from medpfl.core.functional import assignment, mse, psnr, ssim, total_variation

REFERENCE: Any = metrics
PICTURES: Any = data
TRANSFORM: Any = transform


def pair(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An image stack, and a related one."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(*shape, generator=generator)
    return a, (0.6 * a + 0.4 * torch.rand(*shape, generator=generator)).clamp(0, 1)


def reference_ssim(a: Tensor, b: Tensor, data_range: float = 1.0) -> list[float]:
    """scikit-image's value for every image of a stack."""
    return [
        float(
            REFERENCE.structural_similarity(
                x.double().numpy(),
                y.double().numpy(),
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=data_range,
                channel_axis=0,
            )
        )
        for x, y in zip(a, b, strict=True)
    ]


def loop_ssim(a: NDArray[np.float64], b: NDArray[np.float64], stabilizers: tuple[float, float]) -> float:
    """SSIM of one grey image (H, W) window by window, straight from the definition."""
    offsets = np.arange(-5, 6)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    values = []
    for row in range(a.shape[0] - 10):
        for column in range(a.shape[1] - 10):
            x, y = a[row : row + 11, column : column + 11], b[row : row + 11, column : column + 11]
            mean_x, mean_y = (window * x).sum(), (window * y).sum()
            var_x, var_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
            covariance = (window * (x - mean_x) * (y - mean_y)).sum()
            values.append(
                (2 * mean_x * mean_y + stabilizers[0])
                * (2 * covariance + stabilizers[1])
                / ((mean_x**2 + mean_y**2 + stabilizers[0]) * (var_x + var_y + stabilizers[1]))
            )
    return float(np.mean(values))


@pytest.mark.parametrize(
    "shape", [(3, 1, 32, 32), (2, 3, 32, 32), (2, 3, 11, 40), (1, 1, 16, 13, 12), (2, 3, 12, 14, 11), (1, 3, 96, 80)]
)
def test_ssim_agrees_with_scikit_image(shape: tuple[int, ...]) -> None:
    a, b = pair(*shape)
    assert ssim(a, b).tolist() == pytest.approx(reference_ssim(a, b), abs=1e-9)


def test_ssim_agrees_with_scikit_image_on_a_real_medical_picture() -> None:
    picture = TRANSFORM.resize(PICTURES.retina(), (224, 224), anti_aliasing=True)
    a = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    b = (a + 0.05 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    assert ssim(a, b).tolist() == pytest.approx(reference_ssim(a, b), abs=1e-9)


def test_ssim_uses_the_given_range() -> None:
    a, b = pair(2, 1, 20, 24)
    assert ssim(255 * a, 255 * b, data_range=255.0).tolist() == pytest.approx(ssim(a, b).tolist(), abs=1e-6)
    assert ssim(a, b, data_range=255.0).tolist() == pytest.approx(reference_ssim(a, b, 255.0), abs=1e-9)


def test_ssim_with_range_zero_is_the_definition_without_stabilizers() -> None:
    a, b = pair(1, 1, 14, 17)
    expected = loop_ssim(a[0, 0].double().numpy(), b[0, 0].double().numpy(), (0.0, 0.0))
    assert float(ssim(a, b, data_range=0.0)) == pytest.approx(expected, abs=1e-9)
    assert abs(float(ssim(a, b)) - expected) > 1e-4


def test_ssim_of_one_spatial_dimension_agrees_with_a_loop() -> None:
    a, b = pair(1, 1, 30)
    x, y = a[0, 0].double().numpy(), b[0, 0].double().numpy()
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for start in range(20):
        u, v = x[start : start + 11], y[start : start + 11]
        mean_u, mean_v = window @ u, window @ v
        top = (2 * mean_u * mean_v + 1e-4) * (2 * window @ ((u - mean_u) * (v - mean_v)) + 9e-4)
        bottom = (mean_u**2 + mean_v**2 + 1e-4) * (window @ ((u - mean_u) ** 2 + (v - mean_v) ** 2) + 9e-4)
        values.append(top / bottom)
    assert float(ssim(a, b)) == pytest.approx(float(np.mean(values)), abs=1e-10)


@given(seed=st.integers(0, 10**6), channels=st.sampled_from([1, 3]), height=st.integers(11, 18))
@settings(max_examples=30, deadline=None)
def test_ssim_is_symmetric_bounded_and_one_for_equal_images(seed: int, channels: int, height: int) -> None:
    a, b = pair(2, channels, height, 13, seed=seed)
    assert ssim(a, a).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)
    assert ssim(a, b).tolist() == pytest.approx(ssim(b, a).tolist(), abs=1e-12)
    assert bool((ssim(a, b).abs() <= 1.0).all())
    assert ssim(a.flip(0), b.flip(0)).tolist() == pytest.approx(ssim(a, b).flip(0).tolist(), abs=1e-12)


def test_flat_images_are_scored_by_brightness_alone() -> None:
    black, white = torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16)
    assert float(ssim(black, white)) == pytest.approx(1e-4 / (1 + 1e-4), abs=1e-12)
    assert float(ssim(white, white)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 1, 12, 11, 12)])
def test_ssim_is_differentiable(shape: tuple[int, ...]) -> None:
    a, b = pair(*shape)
    x = a.double().requires_grad_()
    (gradient,) = torch.autograd.grad(ssim(x, b).sum(), x)
    direction = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    step = 1e-5
    numeric = (ssim(a + step * direction, b) - ssim(a - step * direction, b)).sum() / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=1e-4)


@pytest.mark.parametrize(("shape", "found"), [((1, 1, 10, 32), "10x32"), ((1, 3, 8, 8), "8x8"), ((1, 3), "no spatial")])
def test_images_that_are_too_small_for_ssim_are_refused_with_the_reason(shape: tuple[int, ...], found: str) -> None:
    with pytest.raises(InputError, match=rf"{found}.*at least 11"):
        ssim(torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize("function", [mse, psnr, ssim])
def test_different_shapes_do_not_broadcast(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match="same shape"):
        function(torch.zeros(2, 1, 16, 16), torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize("shape", [(3, 1, 12, 12), (2, 3, 9, 7, 5)])
def test_psnr_and_mse_agree_with_scikit_image(shape: tuple[int, ...]) -> None:
    a, b = pair(*shape)
    expected = [
        REFERENCE.peak_signal_noise_ratio(x.double().numpy(), y.double().numpy(), data_range=1.0)
        for x, y in zip(a, b, strict=True)
    ]
    assert psnr(a, b).tolist() == pytest.approx(expected, abs=1e-9)
    means = [float(np.mean((x.double() - y.double()).numpy() ** 2)) for x, y in zip(a, b, strict=True)]
    assert mse(a, b).tolist() == pytest.approx(means, rel=1e-12)


def test_psnr_of_an_exact_copy_is_one_hundred_decibel() -> None:
    a, _ = pair(2, 1, 12, 12)
    assert psnr(a, a).tolist() == [100.0, 100.0]
    assert float(psnr(a[:1], a[:1] + 1e-6)) == pytest.approx(100.0)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 4, 3, 5), (2, 1, 7)])
def test_total_variation_agrees_with_a_loop(shape: tuple[int, ...]) -> None:
    images, _ = pair(*shape)
    expected = []
    for image in images.double().numpy():
        total = 0.0
        for axis in range(1, image.ndim):
            moved = np.moveaxis(image, axis, 0)
            total += float(np.mean([np.abs(moved[i + 1] - moved[i]) for i in range(len(moved) - 1)]))
        expected.append(total)
    assert total_variation(images).tolist() == pytest.approx(expected, rel=1e-5)


def test_total_variation_ignores_channels_constants_and_axes_of_one_entry() -> None:
    constant_per_channel = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 6, 6)
    assert total_variation(constant_per_channel).tolist() == [0.0]
    line = torch.linspace(0, 1, 5).reshape(1, 1, 1, 5)
    assert total_variation(line).tolist() == pytest.approx([0.25])


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_assignment_is_the_best_of_all_assignments(rows: int, columns: int, seed: int) -> None:
    cost = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found_rows, found_columns = assignment(cost)
    assert found_rows.tolist() == sorted(set(found_rows.tolist()))
    assert len(set(found_columns.tolist())) == len(found_columns) == min(rows, columns)
    tall = cost if rows <= columns else cost.T
    best = min(
        sum(float(tall[i, j]) for i, j in enumerate(chosen))
        for chosen in itertools.permutations(range(tall.shape[1]), tall.shape[0])
    )
    assert float(cost[found_rows, found_columns].sum()) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_assignment_refuses_costs_that_are_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        assignment(torch.tensor([[value, 1.0]]))

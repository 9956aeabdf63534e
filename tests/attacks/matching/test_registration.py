"""Registration by phase correlation finds and undoes known translations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.registration import phase_cross_correlation

from medpfl.attacks.matching.registration import registered, translate, translations


def scene(count: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    """Smooth random scenes that are larger than the images cut out of them."""
    noise = np.random.default_rng(seed).normal(size=(count, *shape))
    smooth = ndimage.gaussian_filter(noise, (0, *(2.0 for _ in shape)), mode="wrap")
    return np.asarray(0.5 + 0.15 * smooth / smooth.std())


def cut(scenes: np.ndarray[Any, Any], size: int, shift: tuple[float, ...]) -> torch.Tensor:
    """Windows (N, 1, size, ...) in which the scene lies `shift` pixels further."""
    moved = ndimage.shift(scenes, (0, *shift), order=3, mode="grid-wrap")
    window = tuple(slice(8, 8 + size) for _ in shift)
    return torch.from_numpy(moved[(slice(None), *window)][:, None].copy())


@pytest.mark.parametrize("shift", [(3.0, -2.0), (0.0, 0.0), (-5.0, 4.0), (1.5, 0.0), (0.4, -2.3), (2, -1, 3.5)])
def test_known_translations_are_found(shift: tuple[float, ...]) -> None:
    size = 32 if len(shift) == 2 else 20
    scenes = scene(3, (48,) * 2 if len(shift) == 2 else (36,) * 3)
    references, images = cut(scenes, size, (0.0,) * len(shift)), cut(scenes, size, shift)
    found = translations(images, references)
    expected = -torch.tensor(shift, dtype=torch.float64).expand(3, -1)
    torch.testing.assert_close(found, expected, atol=0.2, rtol=0)
    inner: Any = (..., *(slice(8, size - 8) for _ in shift))
    before, after = (
        float((one - references)[inner].square().mean()) for one in (images, registered(images, references))
    )
    assert after <= 0.05 * before + 1e-12


def test_integer_translations_are_those_of_scikit_image() -> None:
    scenes = scene(4, (48, 48), seed=2)
    references, images = cut(scenes, 32, (0.0, 0.0)), cut(scenes, 32, (4.0, -3.0))
    found = translations(images, references)
    for row in range(4):
        reference, image = references[row, 0].numpy(), images[row, 0].numpy()
        expected, *_ = phase_cross_correlation(reference, image, normalization=None)  # type: ignore[no-untyped-call]
        assert (found[row].round().numpy() == expected).all()


def test_whole_pixels_move_without_a_change() -> None:
    images = torch.rand(2, 3, 9, 10)
    moved = translate(images, torch.tensor([[2.0, -1.0], [0.0, 0.0]]))
    assert torch.equal(moved[0, :, 2:, :-1], images[0, :, :-2, 1:])
    assert torch.equal(moved[0, :, 0, :-1], images[0, :, 0, 1:])
    assert torch.equal(moved[1], images[1])


def test_images_that_no_translation_brings_closer_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, other = (torch.rand(20, 1, 16, 16, generator=generator) for _ in range(2))
    near = registered(noise, other)
    assert bool(((near - other).square().flatten(1).sum(1) <= (noise - other).square().flatten(1).sum(1)).all())
    assert torch.equal(registered(noise, noise), noise)
    flat = torch.full((1, 1, 8, 8), 0.25)
    assert torch.equal(registered(flat, noise[:1, :, :8, :8]), flat)

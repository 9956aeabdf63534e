"""Resizing against Pillow's Lanczos filter in floating point, and the aspect policies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from medpfl.core.errors import DataError
from medpfl.data import resize, to_channels

GENERATOR = torch.Generator().manual_seed(0)
IMAGE = torch.rand((1, 41, 60), generator=GENERATOR)


def pillow(image: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    picture = Image.fromarray(image[0].numpy())
    assert picture.mode == "F"
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)).clip(0, 1)


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (41, 20), (64, 100), (7, 90), (1, 1)])
def test_squash_agrees_with_pillow(size: tuple[int, int]) -> None:
    np.testing.assert_allclose(resize(IMAGE, size)[0].numpy(), pillow(IMAGE, size), atol=2e-6)


def test_an_image_of_the_right_size_is_unchanged() -> None:
    for aspect in ("squash", "crop", "pad"):
        assert resize(IMAGE, (41, 60), aspect) is IMAGE


def test_constant_images_stay_constant() -> None:
    assert torch.allclose(resize(torch.full((3, 13, 9), 0.7), (32, 32)), torch.tensor(0.7), atol=1e-6)


def test_ringing_is_clamped() -> None:
    step = torch.zeros(1, 20, 20)
    step[:, :, 10:] = 1.0
    enlarged = resize(step, (64, 64))
    assert float(enlarged.min()) == 0.0
    assert float(enlarged.max()) == 1.0


def test_fine_stripes_average_out_when_reduced() -> None:
    stripes = (torch.arange(128) % 2).float().expand(1, 128, 128)
    inner = resize(stripes, (32, 32))[..., 2:-2]
    assert torch.allclose(inner, torch.tensor(0.5), atol=0.02)


def test_crop_is_the_resized_center() -> None:
    np.testing.assert_allclose(
        resize(IMAGE, (16, 16), "crop").numpy(), resize(IMAGE[:, :, 9:50], (16, 16)).numpy(), atol=1e-7
    )
    tall = IMAGE.transpose(1, 2)
    np.testing.assert_allclose(
        resize(tall, (16, 32), "crop").numpy(), resize(tall[:, 20:40], (16, 32)).numpy(), atol=1e-7
    )


def test_pad_keeps_the_whole_image_on_black() -> None:
    padded = resize(IMAGE, (30, 30), "pad")
    height = round(41 * 30 / 60)
    top = (30 - height) // 2
    assert torch.equal(padded[:, top : top + height], resize(IMAGE, (height, 30)))
    assert float(padded[:, :top].abs().sum() + padded[:, top + height :].abs().sum()) == 0.0


def test_very_thin_images_keep_a_pixel() -> None:
    assert float(resize(torch.ones(1, 1, 500), (8, 8), "pad").sum()) > 0
    assert resize(torch.ones(1, 1, 500), (8, 8), "crop").shape == (1, 8, 8)


def test_volumes_are_resized_along_each_axis() -> None:
    volume = 0.4 + 0.2 * torch.rand((1, 10, 12, 14), generator=GENERATOR)  # no value is clamped on the way
    result = resize(volume, (5, 6, 7))
    by_slices = torch.stack([resize(volume[:, :, :, k], (5, 6)) for k in range(14)], dim=-1)
    assert result.shape == (1, 5, 6, 7)
    lines = resize(by_slices.reshape(1, 30, 14), (30, 7)).reshape(1, 5, 6, 7)
    assert torch.allclose(result, lines, atol=1e-6)


def test_gray_becomes_color_by_repetition() -> None:
    color = to_channels(IMAGE, 3, "x")
    assert color.shape == (3, 41, 60)
    assert all(torch.equal(channel, IMAGE[0]) for channel in color)


def test_color_becomes_gray_by_luma() -> None:
    color = torch.rand((3, 9, 8), generator=GENERATOR)
    red, green, blue = color
    assert torch.allclose(to_channels(color, 1, "x")[0], 0.299 * red + 0.587 * green + 0.114 * blue, atol=1e-6)
    eight_bit = (color * 255).round().byte()
    pillow_gray = np.asarray(Image.fromarray(eight_bit.permute(1, 2, 0).numpy()).convert("L"))
    np.testing.assert_allclose(to_channels(eight_bit / 255, 1, "x")[0].numpy() * 255, pillow_gray, atol=1.01)
    assert float(to_channels(torch.ones(3, 2, 2), 1, "x").max()) <= 1.0


def test_other_numbers_of_channels_are_refused() -> None:
    with pytest.raises(DataError, match="image 7: 2 channels cannot become 3"):
        to_channels(torch.zeros(2, 4, 4), 3, "image 7")

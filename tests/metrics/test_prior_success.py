"""The success of a blind guess."""

from __future__ import annotations

import pytest
import torch

from medpfl.metrics.privacy.prior_success import prior_success


def test_unlike_images_leave_one_in_as_many() -> None:
    images = torch.rand(20, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert prior_success(images, 0.9) == pytest.approx(1 / 20)


def test_the_share_of_the_most_frequent_picture_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    repeated = torch.rand(1, 1, 16, 16, generator=generator).repeat(6, 1, 1, 1)
    images = torch.cat([repeated, torch.rand(14, 1, 16, 16, generator=generator)])
    assert prior_success(images, 0.9) == pytest.approx(6 / 20)


def test_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        prior_success(torch.zeros(0, 1, 16, 16), 0.9)

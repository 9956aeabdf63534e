"""Dice of masks against counted pixels, and where it stands in scores."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from medpfl.core.domain import Reconstruction
from medpfl.core.errors import AttackFailure
from medpfl.metrics.cells import supplement_cell
from medpfl.metrics.masks import mask_dice
from medpfl.metrics.scoring import score
from medpfl.metrics.truth import GroundTruth


def test_dice_counts_pixels() -> None:
    true = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 2, 2]])
    found = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]])
    expected = [2 * 2 / 6, 1.0, 0.0, (2 * 1 / 3 + 0.0) / 2]
    assert mask_dice(found, true).tolist() == pytest.approx(expected)


def reconstruction(images: torch.Tensor, masks: torch.Tensor | None) -> Reconstruction:
    return Reconstruction(images, None, 0.0, (), 1, "done", masks=masks)


def test_masks_follow_the_image_that_they_came_with() -> None:
    images = torch.rand(2, 1, 12, 12)
    masks = torch.stack([torch.zeros(12, 12), torch.ones(12, 12)]).long()
    truth = GroundTruth(images, torch.tensor([0, 1]), ("a", "b"), masks)
    scores = score(reconstruction(images.flip(0), masks.flip(0)), truth, fallback=torch.zeros(1, 12, 12))
    assert [one.mask_dice for one in scores] == [1.0, 1.0]
    assert scores[1].mask is not None
    assert torch.equal(scores[1].mask, masks[1])
    swapped = score(reconstruction(images, masks.flip(0)), truth, fallback=torch.zeros(1, 12, 12))
    assert [one.mask_dice for one in swapped] == [0.0, 0.0]


def test_without_a_mask_on_either_side_there_is_no_dice() -> None:
    images, masks = torch.rand(1, 1, 12, 12), torch.zeros(1, 12, 12, dtype=torch.int64)
    fallback = torch.zeros(1, 12, 12)
    plain = GroundTruth(images, torch.tensor([0]), ("a",))
    with_masks = GroundTruth(images, torch.tensor([0]), ("a",), masks)
    assert score(reconstruction(images, masks), plain, fallback=fallback)[0].mask_dice is None
    assert score(reconstruction(images, None), with_masks, fallback=fallback)[0].mask_dice is None
    assert score(None, with_masks, fallback=fallback)[0].mask_dice is None
    with pytest.raises(AttackFailure, match="masks of shape"):
        score(reconstruction(images, masks[:, :6]), with_masks, fallback=fallback)


def test_a_cells_mean_leaves_out_images_without_a_found_mask() -> None:
    rows = pd.DataFrame(
        {"status": ["done", "done", "failed"], "mask_dice": [0.5, None, None], "ssim": [1.0, 1.0, None]}
    )
    assert supplement_cell(rows, threshold=0.9)["mask_dice_mean"] == 0.5
    assert supplement_cell(rows.drop(columns="mask_dice"), threshold=0.9)["mask_dice_mean"] is None

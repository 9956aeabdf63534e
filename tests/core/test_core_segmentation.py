"""The loss of segmentation: closed forms, MONAI's loss, class maps, per-image means and second derivatives."""

from __future__ import annotations

import math

import pytest
import torch

from medpfl.core.tasks import Segmentation


def test_an_undecided_model_has_the_loss_of_a_closed_form() -> None:
    # Scores 0 everywhere: p = 1/2 in all 8 pixels, 2 of which are of class 1.
    mask = torch.zeros(1, 2, 4, dtype=torch.int64)
    mask[0, 0, :2] = 1
    background, lesion = 1 - 2 * 3 / (4 + 6), 1 - 2 * 1 / (4 + 2)
    scores = torch.zeros(1, 2, 2, 4)
    loss = Segmentation(2, smoothing=0.0).loss(scores, mask)
    assert float(loss) == pytest.approx((background + lesion) / 2 + math.log(2))
    alone = Segmentation(2, smoothing=0.0, background=False, cross_entropy=0.0).loss(scores, mask)
    assert float(alone) == pytest.approx(lesion)
    weighted = Segmentation(2, smoothing=0.0, dice=0.25, cross_entropy=2.0).loss(scores, mask)
    assert float(weighted) == pytest.approx(0.25 * (background + lesion) / 2 + 2 * math.log(2))


def test_smoothing_alone_remains_where_neither_side_has_a_class() -> None:
    sure = torch.tensor([200.0, -200.0]).reshape(1, 2, 1, 1).expand(1, 2, 3, 3)
    empty = torch.zeros(1, 3, 3, dtype=torch.int64)
    assert float(Segmentation(2).loss(sure, empty)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 5)])
@pytest.mark.parametrize("background", [True, False])
def test_it_is_monais_dice_and_cross_entropy(shape: tuple[int, ...], background: bool) -> None:
    losses = pytest.importorskip("monai.losses", reason="the extra medpfl[monai] is not installed")
    theirs = losses.DiceCELoss(to_onehot_y=True, softmax=True, include_background=background)
    scores, masks = torch.randn(2, 3, *shape), torch.randint(3, (2, *shape))
    found = Segmentation(3, background=background).loss(scores, masks)
    assert float(found) == pytest.approx(float(theirs(scores, masks.unsqueeze(1))), rel=1e-5)


def test_masks_and_their_class_maps_are_the_same_target() -> None:
    task, scores, masks = Segmentation(4), torch.randn(2, 4, 6, 5), torch.randint(4, (2, 6, 5))
    maps = task.encode(masks)
    assert maps.shape == scores.shape
    assert torch.equal(maps.argmax(dim=1), masks)
    assert torch.equal(maps.sum(dim=1), torch.ones(2, 6, 5))
    assert torch.equal(task.encode(maps), maps)
    torch.testing.assert_close(task.loss(scores, masks), task.loss(scores, maps))


def test_the_loss_of_a_batch_is_the_mean_of_its_images_losses() -> None:
    task, scores, masks = Segmentation(3), torch.randn(4, 3, 5, 5), torch.randint(3, (4, 5, 5))
    singles = torch.func.vmap(lambda output, mask: task.loss(output[None], mask[None]))(scores, masks)
    torch.testing.assert_close(task.loss(scores, masks), singles.mean())


def test_it_is_twice_differentiable_in_scores_and_class_maps() -> None:
    task = Segmentation(3, smoothing=0.1)
    scores = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    maps = torch.rand(2, 3, 2, 2, dtype=torch.float64).softmax(dim=1).requires_grad_()
    assert torch.autograd.gradcheck(task.loss, (scores, maps))
    assert torch.autograd.gradgradcheck(task.loss, (scores, maps))


def test_half_precision_scores_of_large_images_do_not_overflow() -> None:
    scores = torch.zeros(1, 2, 400, 400, dtype=torch.float16)
    mask = torch.zeros(1, 400, 400, dtype=torch.int64)
    task = Segmentation(2)
    assert float(task.loss(scores, mask)) == pytest.approx(float(task.loss(scores.double(), mask)), rel=1e-4)

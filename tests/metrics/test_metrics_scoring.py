"""One honest score per private image, whatever came back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import metrics
from torch import Tensor

from medpfl.core.domain import Reconstruction
from medpfl.core.errors import AttackFailure, InputError
from medpfl.metrics.scoring import pairwise_mse, score
from medpfl.metrics.truth import GroundTruth

REFERENCE: Any = metrics

GREY = torch.full((1, 16, 16), 0.5)


def random_images(count: int, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, 16, 16, generator=torch.Generator().manual_seed(seed))


def ground_truth(images: Tensor, labels: Tensor | None = None) -> GroundTruth:
    labels = torch.arange(len(images)) if labels is None else labels
    return GroundTruth(images, labels, tuple(f"item-{index}" for index in range(len(images))))


def returned(images: Tensor, labels: Tensor | None = None, unclamped: Tensor | None = None) -> Reconstruction:
    return Reconstruction(
        images=images,
        labels=labels,
        objective=0.0,
        trace=(),
        gradient_evaluations=1,
        stop_reason="budget",
        unclamped=unclamped,
    )


def test_the_numbers_are_those_of_scikit_image() -> None:
    truth, came_back = random_images(1, 3), random_images(1, 3, seed=1)
    (only,) = score(returned(came_back), ground_truth(truth), fallback=GREY.expand(3, 16, 16))
    a, b = truth[0].double().numpy(), came_back[0].double().numpy()
    expected = REFERENCE.structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=0
    )
    assert only.ssim == pytest.approx(expected, abs=1e-9)
    assert only.psnr == pytest.approx(REFERENCE.peak_signal_noise_ratio(a, b, data_range=1.0), abs=1e-9)
    assert only.mse == pytest.approx(float(((a - b) ** 2).mean()), rel=1e-9)
    assert not only.success


def test_candidates_find_their_images_and_bring_their_labels() -> None:
    truth = random_images(4)
    order = [2, 0, 3, 1]
    scores = score(
        returned(truth[order], labels=torch.tensor([2, 0, 3, 7])), ground_truth(truth), fallback=GREY, threshold=0.9
    )
    assert [one.position for one in scores] == [0, 1, 2, 3]
    assert [one.item for one in scores] == ["item-0", "item-1", "item-2", "item-3"]
    assert [one.candidate for one in scores] == [1, 3, 0, 2]
    assert [one.psnr for one in scores] == [100.0] * 4
    assert all(one.success and one.candidates == 4 for one in scores)
    assert [one.label_inferred for one in scores] == [0, 7, 2, 3]
    assert [one.label_correct for one in scores] == [True, False, True, True]


@given(seed=st.integers(0, 10**6), count=st.integers(1, 4), candidates=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_the_assignment_has_the_least_total_error_and_order_does_not_matter(
    seed: int, count: int, candidates: int
) -> None:
    truth, came_back = random_images(count, seed=seed), random_images(candidates, seed=seed + 1)
    scores = score(returned(came_back), ground_truth(truth), fallback=GREY)
    assigned = [one for one in scores if one.candidate is not None]
    assert len(assigned) == min(count, candidates)
    cost = pairwise_mse(truth, came_back)
    tall = cost if count <= candidates else cost.T
    best = min(
        sum(float(tall[i, j]) for i, j in enumerate(chosen))
        for chosen in itertools.permutations(range(tall.shape[1]), tall.shape[0])
    )
    assert sum(one.mse for one in assigned) == pytest.approx(best, abs=1e-9)
    order = torch.randperm(candidates, generator=torch.Generator().manual_seed(seed))
    shuffled = score(returned(came_back[order]), ground_truth(truth), fallback=GREY)
    assert [one.ssim for one in shuffled] == [one.ssim for one in scores]
    assert [one.psnr for one in shuffled] == [one.psnr for one in scores]


def test_pairwise_mse_agrees_with_a_loop() -> None:
    a, b = random_images(3, 3), random_images(5, 3, seed=1)
    expected = [[float((x.double() - y.double()).square().mean()) for y in b] for x in a]
    assert torch.allclose(pairwise_mse(a, b), torch.tensor(expected, dtype=torch.float64), atol=1e-14)


def test_an_image_without_candidate_is_scored_against_the_fallback() -> None:
    truth = random_images(3)
    scores = score(returned(truth[1:2], labels=torch.tensor([1])), ground_truth(truth), fallback=GREY)
    assert [one.candidate for one in scores] == [None, 0, None]
    assert [one.label_correct for one in scores] == [None, True, None]
    for position in (0, 2):
        assert torch.equal(scores[position].image, GREY)
        assert scores[position].mse == pytest.approx(float((truth[position].double() - 0.5).square().mean()), rel=1e-9)
        assert scores[position].candidates == 1


def test_nothing_came_back() -> None:
    truth = random_images(2)
    scores = score(None, ground_truth(truth), fallback=GREY)
    assert [(one.candidate, one.candidates, one.label_inferred, one.success) for one in scores] == [
        (None, 0, None, False)
    ] * 2


def test_the_image_that_was_scored_is_kept() -> None:
    truth, came_back = random_images(2), random_images(2, seed=1)
    for one in score(returned(came_back), ground_truth(truth), fallback=GREY):
        assert one.candidate is not None
        assert torch.equal(one.image, came_back[one.candidate])


def test_the_threshold_decides_what_a_success_is() -> None:
    truth = random_images(1)
    came_back = (truth + 0.1 * random_images(1, seed=1)).clamp(0, 1)
    (one,) = score(returned(came_back), ground_truth(truth), fallback=GREY)
    (strict,) = score(returned(came_back), ground_truth(truth), fallback=GREY, threshold=one.ssim + 1e-9)
    (lenient,) = score(returned(came_back), ground_truth(truth), fallback=GREY, threshold=one.ssim)
    assert not strict.success
    assert lenient.success


def test_soft_labels_of_a_single_label_task_go_to_the_largest() -> None:
    truth = random_images(1)
    (one,) = score(
        returned(truth, labels=torch.tensor([[0.1, 0.7, 0.2]])), ground_truth(truth, torch.tensor([1])), fallback=GREY
    )
    assert (one.label, one.label_inferred, one.label_correct) == (1, 1, True)


def test_label_vectors_must_match_in_every_class() -> None:
    truth = random_images(2)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    inferred = torch.tensor([[0.9, 0.2, 0.6], [0.1, 0.8, 0.0]])
    scores = score(returned(truth, labels=inferred), ground_truth(truth, labels), fallback=GREY)
    assert [one.label for one in scores] == [[1, 0, 1], [0, 0, 0]]
    assert [one.label_inferred for one in scores] == [[1, 0, 1], [0, 1, 0]]
    assert [one.label_correct for one in scores] == [True, False]


def test_a_class_index_is_compared_with_a_label_vector_as_one_hot() -> None:
    truth = random_images(2)
    labels = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    scores = score(returned(truth, labels=torch.tensor([1, 1])), ground_truth(truth, labels), fallback=GREY)
    assert [one.label_correct for one in scores] == [True, False]


def test_headline_numbers_are_in_the_unit_range_and_legacy_ones_see_the_unclamped_result() -> None:
    truth = torch.zeros(1, 1, 16, 16)
    raw = torch.full((1, 1, 16, 16), -2.0)
    (one,) = score(returned(raw.clamp(0, 1), unclamped=raw), ground_truth(truth), fallback=GREY)
    assert one.mse == 0.0
    assert one.legacy_mse == pytest.approx(4.0)
    (without,) = score(returned(raw), ground_truth(truth), fallback=GREY)
    assert without.mse == 0.0
    assert without.image.min() == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_fails_the_case(value: float) -> None:
    came_back = random_images(1)
    came_back[0, 0, 3, 3] = value
    with pytest.raises(AttackFailure, match="not finite"):
        score(returned(came_back), ground_truth(random_images(1)), fallback=GREY)


def test_a_result_of_another_shape_fails_the_case() -> None:
    with pytest.raises(AttackFailure, match=r"\(3, 16, 16\)"):
        score(returned(random_images(1, 3)), ground_truth(random_images(1)), fallback=GREY)


def test_images_too_small_for_ssim_are_the_users_problem() -> None:
    truth = GroundTruth(torch.zeros(1, 1, 8, 8), torch.tensor([0]), ("a",))
    with pytest.raises(InputError, match="8x8"):
        score(None, truth, fallback=torch.zeros(1, 8, 8))


def test_volumes_are_scored_too() -> None:
    truth = torch.rand(2, 1, 11, 12, 13, generator=torch.Generator().manual_seed(0))
    scores = score(returned(truth.flip(0)), ground_truth(truth), fallback=torch.full((1, 11, 12, 13), 0.5))
    assert [one.candidate for one in scores] == [1, 0]
    assert all(one.success for one in scores)

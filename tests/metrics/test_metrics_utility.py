"""Balanced accuracy, area under the curve and their intervals, against pairs, SciPy and the binomial distribution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from medpfl.metrics.utility import SAMPLES, area_under_curve, balanced_accuracy, classified, over_seeds


def drawn(images: int, classes: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    targets = rng.integers(classes, size=images)
    return np.round(rng.normal(size=(images, classes)) + np.eye(classes)[targets], 1), targets


def by_pairs(scores: NDArray[np.float64], inside: NDArray[np.bool_]) -> float:
    """Share of pairs in the right order, ties counting half."""
    pairs = list(itertools.product(scores[inside], scores[~inside]))
    return float(np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_area_of_two_classes_is_the_share_of_ordered_pairs(seed: int) -> None:
    outputs, targets = drawn(60, 2, seed)
    margin = np.round(outputs[:, 1] - outputs[:, 0], 6)
    expected = by_pairs(margin, targets == 1)
    statistic = mannwhitneyu(margin[targets == 1], margin[targets == 0]).statistic
    assert expected == pytest.approx(statistic / (targets == 1).sum() / (targets == 0).sum())
    rounded = np.stack([np.zeros(len(margin)), margin], axis=1)
    assert area_under_curve(rounded, targets) == pytest.approx(expected, abs=1e-9)


def test_the_area_of_several_classes_is_the_mean_of_each_against_the_rest() -> None:
    outputs, targets = drawn(80, 4, 3)
    shares = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    expected = np.mean([by_pairs(shares[:, name], targets == name) for name in range(4)])
    assert area_under_curve(outputs, targets) == pytest.approx(expected, abs=1e-9)


def test_balanced_accuracy_is_the_mean_recall_whatever_the_sizes() -> None:
    outputs = [[1.0, 0.0]] * 9 + [[0.0, 1.0]] + [[0.0, 1.0]]
    targets = [0] * 10 + [1]
    assert balanced_accuracy(outputs, targets) == pytest.approx((0.9 + 1.0) / 2)


def test_who_always_says_the_same_class_or_nothing_is_at_chance() -> None:
    targets = [0] * 50 + [1] * 3 + [2] * 7
    for row in ([5.0, 0.0, 0.0], [0.0, 0.0, 0.0], [float("nan"), 0.0, 0.0]):
        outputs = [row] * len(targets)
        assert balanced_accuracy(outputs, targets) == pytest.approx(1 / 3)
        assert area_under_curve(outputs, targets) == pytest.approx(0.5)


def test_several_labels_are_judged_one_by_one() -> None:
    outputs, targets = (
        [[1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]],
        [[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]],
    )
    first = (2 / 3 + 1.0) / 2
    assert balanced_accuracy(outputs, targets) == pytest.approx((first + 1.0) / 2)
    areas = [by_pairs(np.array(outputs)[:, name], np.array(targets)[:, name] > 0) for name in range(2)]
    assert area_under_curve(outputs, targets) == pytest.approx(np.mean(areas))


def test_resampled_images_spread_as_the_binomial_distribution_says() -> None:
    hits = np.array([True] * 80 + [False] * 20 + [True] * 60 + [False] * 40)
    targets = np.array([0] * 100 + [1] * 100)
    chosen = np.where(hits, targets, 1 - targets)
    found = classified(np.eye(2)[chosen], targets).resampled["balanced_accuracy"]
    spread = np.sqrt(0.8 * 0.2 / 100 + 0.6 * 0.4 / 100) / 2
    assert np.std(found) == pytest.approx(spread, rel=0.15)
    assert np.mean(found) == pytest.approx(0.7, abs=4 * spread / np.sqrt(SAMPLES))


def test_images_of_one_patient_are_resampled_together() -> None:
    targets = np.array([0] * 20 + [1] * 20)
    outputs = np.eye(2)[np.where(np.arange(40) % 20 < 10, targets, 1 - targets)]
    patients = [f"{place // 10}" for place in range(40)]  # one patient of each class is recognized, the other is not
    alone, together = classified(outputs, targets), classified(outputs, targets, patients)
    assert np.std(together.resampled["balanced_accuracy"]) > 2 * np.std(alone.resampled["balanced_accuracy"])


def test_the_interval_grows_with_the_spread_over_runs() -> None:
    alike = over_seeds([0.8, 0.8, 0.8], [[0.78, 0.8, 0.82] * 100] * 3)
    unlike = over_seeds([0.6, 0.8, 1.0], [[value] * 300 for value in (0.6, 0.8, 1.0)])
    assert alike.mean == pytest.approx(unlike.mean)
    assert alike.low is not None
    assert unlike.low is not None
    assert unlike.low < alike.low < 0.8
    assert over_seeds([], []).mean is None

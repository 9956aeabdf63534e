"""Intervals against scipy's bootstrap, closed forms and simulated coverage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medpfl.metrics.statistics import Interval, bootstrap_mean, median, paired_difference, success_curve, success_rate


def test_one_image_per_victim_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=24)
    ours = bootstrap_mean(values, range(24), samples=20000, seed=1)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", random_state=2)
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.02)


def test_unequal_victims_agree_with_scipy_on_whole_victims() -> None:
    random = np.random.default_rng(3)
    victims = np.repeat(np.arange(12), random.integers(1, 9, size=12))
    values = random.normal(size=len(victims)) + random.normal(size=12)[victims]
    sums = np.array([values[victims == victim].sum() for victim in range(12)])
    counts = np.array([(victims == victim).sum() for victim in range(12)])

    def ratio(a: Any, b: Any, axis: int) -> Any:
        return a.sum(axis=axis) / b.sum(axis=axis)

    theirs = stats.bootstrap(
        (sums, counts), ratio, paired=True, n_resamples=20000, method="percentile", random_state=4
    ).confidence_interval
    ours = bootstrap_mean(values, victims, samples=20000, seed=5)
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.03)
    assert ours.high == pytest.approx(theirs.high, abs=0.03)


def test_copies_of_a_victims_images_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(0).normal(size=10)
    once = bootstrap_mean(values, range(10), seed=0)
    eightfold = bootstrap_mean(np.repeat(values, 8), np.repeat(np.arange(10), 8), seed=0)
    pretended = bootstrap_mean(np.repeat(values, 8), range(80), seed=0)
    assert (eightfold.low, eightfold.high) == pytest.approx((once.low, once.high))
    assert pretended.low is not None
    assert once.low is not None
    assert pretended.low > once.low


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(11)
    hits = 0
    for trial in range(300):
        effect = random.normal(size=20)
        values = np.repeat(effect, 4) + 0.2 * random.normal(size=80)
        interval = bootstrap_mean(values, np.repeat(np.arange(20), 4), samples=400, seed=trial)
        assert interval.low is not None
        assert interval.high is not None
        hits += interval.low <= 0.0 <= interval.high
    assert 0.88 <= hits / 300 <= 0.98


def test_the_same_seed_gives_the_same_interval_and_levels_nest() -> None:
    values, victims = np.random.default_rng(0).normal(size=30), np.arange(30) // 3
    assert bootstrap_mean(values, victims, seed=4) == bootstrap_mean(values, victims, seed=4)
    assert bootstrap_mean(values, victims, seed=4) != bootstrap_mean(values, victims, seed=5)
    wide, narrow = (bootstrap_mean(values, victims, seed=4, level=level) for level in (0.99, 0.5))
    assert wide.low is not None
    assert wide.high is not None
    assert narrow.low is not None
    assert narrow.high is not None
    assert wide.low < narrow.low < narrow.high < wide.high


@given(
    st.lists(st.tuples(st.floats(-50, 100), st.integers(0, 6)), min_size=1, max_size=30),
    st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None)
def test_the_mean_lies_in_its_interval_and_the_interval_in_the_data(rows: list[tuple[float, int]], seed: int) -> None:
    values, victims = [row[0] for row in rows], [row[1] for row in rows]
    interval = bootstrap_mean(values, victims, samples=100, seed=seed)
    assert interval.mean == pytest.approx(np.mean(values), abs=1e-9)
    if len(set(victims)) == 1:
        assert interval.low is None
        assert interval.high is None
    else:
        assert interval.low is not None
        assert interval.high is not None
        assert min(values) - 1e-9 <= interval.low <= float(np.mean(values)) + 1e-9
        assert float(np.mean(values)) - 1e-9 <= interval.high <= max(values) + 1e-9


def test_nothing_finished_has_no_mean_and_one_victim_has_no_interval() -> None:
    assert bootstrap_mean([], [], seed=0) == Interval(None, None, None)
    assert success_rate([], [], seed=0) == Interval(None, None, None)
    assert bootstrap_mean([1.0, 2.0], [3, 3], seed=0) == Interval(1.5, None, None)
    assert success_rate([True, True], [3, 3], seed=0) == Interval(1.0, None, None)


def test_a_value_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean([1.0, float("nan")], [0, 1], seed=0)


@pytest.mark.parametrize("victims", [2, 16, 50])
def test_none_or_all_successful_gives_the_exact_binomial_bound(victims: int) -> None:
    bound = 1.0 - 0.025 ** (1.0 / victims)
    none = success_rate([False] * victims * 3, np.repeat(np.arange(victims), 3), seed=0)
    every = success_rate([True] * victims * 3, np.repeat(np.arange(victims), 3), seed=0)
    assert (none.mean, none.low, none.high) == pytest.approx((0.0, 0.0, bound))
    assert (every.mean, every.low, every.high) == pytest.approx((1.0, 1.0 - bound, 1.0))


def test_mixed_success_is_bootstrapped_over_victims() -> None:
    success, victims = [True] * 5 + [False] * 15, np.arange(20) // 2
    assert success_rate(success, victims, seed=2) == bootstrap_mean(np.array(success, float), victims, seed=2)
    interval = success_rate(success, victims, seed=2)
    assert interval.mean == 0.25
    assert interval.low is not None
    assert interval.high is not None
    assert 0.0 <= interval.low < 0.25 < interval.high <= 0.6


def test_paired_differences_see_what_separate_intervals_hide() -> None:
    random = np.random.default_rng(0)
    difficulty = 10 * random.normal(size=20)
    a, b = difficulty + 1.0 + 0.1 * random.normal(size=20), difficulty
    interval = paired_difference(a, b, range(20), seed=0)
    assert interval.mean == pytest.approx((a - b).mean())
    assert interval.low is not None
    assert interval.high is not None
    assert 0.9 < interval.low < interval.high < 1.1
    separate = bootstrap_mean(a, range(20), seed=0)
    assert separate.low is not None
    assert separate.low < b.mean()


def test_the_curve_counts_failed_images_as_not_successful() -> None:
    values = [0.99, 0.9, 0.3, float("nan")]
    thresholds = np.linspace(0, 1, 11)
    expected = [sum(1 for value in values if value >= at) / 4 for at in thresholds]
    curve = success_curve(values, thresholds)
    assert curve.tolist() == pytest.approx(expected)
    assert curve[0] == 0.75
    assert bool((np.diff(curve) <= 0).all())
    assert np.isnan(success_curve([], [0.5])).all()


def test_median() -> None:
    assert median([]) is None
    assert median([3.0, 1.0, 2.0]) == 2.0

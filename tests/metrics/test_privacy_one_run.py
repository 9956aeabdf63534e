"""One-run audits: published values, and that they do not claim more than is true."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medpfl.core.guarantees import Release
from medpfl.metrics.privacy.accounting import privacy_curve
from medpfl.metrics.privacy.one_run import ceiling, epsilon_from_guesses, one_run_audit
from medpfl.metrics.privacy.one_run_gaussian import one_run_gaussian_audit


@pytest.mark.parametrize(
    ("canaries", "guesses", "right", "pure", "approximate"),
    [(1000, 100, 100, 3.493, 3.465), (1000, 100, 95, 2.172, 2.165), (1000, 1000, 600, 0.2975, 0.2972)],
)
def test_published_values(canaries: int, guesses: int, right: int, pure: float, approximate: float) -> None:
    assert epsilon_from_guesses(canaries, guesses, right) == pytest.approx(pure, abs=6e-4)
    assert epsilon_from_guesses(canaries, guesses, right, 1e-5) == pytest.approx(approximate, abs=6e-4)


def test_guesses_that_chance_explains_show_nothing() -> None:
    assert epsilon_from_guesses(1000, 1000, 520) == 0.0


@pytest.mark.parametrize(("guesses", "most"), [(50, 2.79), (100, 3.49), (200, 4.19), (1000, 5.81), (10_000, 8.11)])
def test_ceiling(guesses: int, most: float) -> None:
    assert ceiling(guesses) == pytest.approx(most, abs=0.006)
    assert epsilon_from_guesses(10**5, guesses, guesses) == pytest.approx(most, abs=0.006)


def test_coins_that_lie_as_often_as_epsilon_allows_are_not_overstated() -> None:
    """Randomized response of a known epsilon: the bound may exceed it in one of twenty audits."""
    draws, epsilon, exceeded, found = np.random.default_rng(1), 1.0, 0, []
    for _ in range(60):
        included = draws.random(1000) < 0.5
        truthful = draws.random(1000) < math.e / (1 + math.e)
        audit = one_run_audit(np.where(included == truthful, 1.0, 0.0) + 1e-6 * draws.random(1000), included)
        exceeded += audit.epsilon > epsilon
        found.append(audit.epsilon)
    assert exceeded <= 6
    assert np.median(found) > 0.5


def test_gaussian_canaries_are_not_overstated_and_the_gaussian_form_shows_more() -> None:
    draws, delta = np.random.default_rng(2), 1e-5
    truth = privacy_curve([Release("gaussian", 0.5)]).epsilon(delta)
    general, gaussian = [], []
    for _ in range(5):
        included = draws.random(2000) < 0.5
        scores = draws.normal(np.where(included, 2.0, 0.0), 1.0)
        general.append(one_run_audit(scores, included, delta=delta).epsilon)
        gaussian.append(one_run_gaussian_audit(scores, included, delta=delta).epsilon)
    assert max(general) < truth
    assert max(gaussian) < truth
    assert np.median(gaussian) > np.median(general) + 0.5
    assert np.median(general) > 2


def test_scores_that_say_nothing_show_nothing() -> None:
    draws = np.random.default_rng(3)
    included = draws.random(1000) < 0.5
    scores = draws.normal(size=1000)
    assert one_run_audit(scores, included).epsilon < 0.3
    assert one_run_gaussian_audit(scores, included, delta=1e-5).epsilon < 0.3


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="one score and one bool"):
        one_run_audit([1.0, 2.0], [True])
    with pytest.raises(ValueError, match="not finite"):
        one_run_audit([1.0, math.nan], [True, False])

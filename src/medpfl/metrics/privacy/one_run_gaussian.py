"""One-run audit of mechanisms that are claimed to be Gaussian: a tighter lower bound than for any (epsilon, delta)."""

from __future__ import annotations

from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

from medpfl.core.guarantees import Release
from medpfl.metrics.privacy.accounting import privacy_curve
from medpfl.metrics.privacy.one_run import LowerBound, checked, guess_counts, right_guesses

MOST_DISTANCE = 20.0
"""Gaussian distances (1 / noise multiplier) are looked for up to here."""


def one_run_gaussian_audit(
    scores: ArrayLike, included: ArrayLike, *, delta: float, confidence: float = 0.95
) -> LowerBound:
    """As `one_run_audit`, for training that is Gaussian-private: the noise multiplier can be at most so large.

    Mahloujifar, Melis, Chaudhuri: Auditing f-Differential Privacy in One Run (arXiv 2410.22235), Algorithm 3 with the
    trade-off function of the Gaussian mechanism. The epsilon is that of the largest distance that is refuted. It holds
    for what composes to a Gaussian mechanism, such as DP-SGD without sampling; with sampling, `one_run_audit` is safe.

    >>> found = one_run_gaussian_audit([*range(100, 200), *range(100)], [True] * 100 + [False] * 100, delta=1e-5)
    >>> round(found.epsilon, 2), found.right
    (6.91, 200)
    """
    values, members = checked(scores, included)
    tried = guess_counts(len(values))
    level = (1 - confidence) / len(tried)
    found = []
    for guesses in tried:
        right = right_guesses(values, members, guesses)
        found.append((least_distance(len(values), guesses, right, 1 - level), guesses, right))
    distance, guesses, right = max(found)
    highest = least_distance(len(values), guesses, guesses, 1 - level)
    return LowerBound(
        _epsilon(distance, delta), _epsilon(highest, delta), len(values), guesses, right, delta, confidence
    )


def least_distance(canaries: int, guesses: int, right: int, confidence: float = 0.95) -> float:
    """The largest 1 / noise multiplier under which so many right guesses would be too unlikely; 0 if there is none."""
    if not refuted(0.0, canaries, guesses, right, confidence):
        return 0.0
    low, high = 0.0, MOST_DISTANCE
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle, canaries, guesses, right, confidence) else (low, middle)
    return low


def refuted(distance: float, canaries: int, guesses: int, right: int, confidence: float = 0.95) -> bool:
    """Whether a Gaussian mechanism of this distance lets so many guesses be right too rarely."""
    correct = (1 - confidence) * right / canaries
    wrong = (1 - confidence) * (guesses - right) / canaries
    for number in range(right - 1, -1, -1):
        next_wrong = max(wrong, float(ndtr(ndtri(correct) - distance)))
        correct += number / (guesses - number) * (next_wrong - wrong)
        wrong = next_wrong
        if correct + wrong > guesses / canaries:
            return True
    return False


def _epsilon(distance: float, delta: float) -> float:
    return privacy_curve([Release("gaussian", 1 / distance)]).epsilon(delta) if distance > 0 else 0.0

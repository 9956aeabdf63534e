"""Empirical lower bounds on epsilon from one run with canaries, each of which was included by a fair coin."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import binom

Floats = NDArray[np.float64]

LARGEST = 60.0
"""Epsilons are looked for up to here."""

GUESSES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the canaries that are guessed; the error is shared among them (Bonferroni)."""


@dataclass(frozen=True)
class LowerBound:
    """What a one-run audit shows: with the given confidence epsilon is at least `epsilon`.

    guesses, right: of so many canaries it was guessed whether they were included, so many guesses were right.
    ceiling: what as many guesses can show at most, were all right. A low bound near its ceiling says little about the
    mechanism; more canaries would say more.
    """

    epsilon: float
    ceiling: float
    canaries: int
    guesses: int
    right: int
    delta: float
    confidence: float


def one_run_audit(
    scores: ArrayLike, included: ArrayLike, *, delta: float = 0.0, confidence: float = 0.95
) -> LowerBound:
    """Lower bound on epsilon from canaries' scores (m,) and which of them were included (m,) bool.

    A higher score must speak for inclusion. As many of the highest scores are guessed as included as of the lowest as
    not; the others are left open. Several numbers of guesses are tried (`GUESSES`), each at its share of the error.
    Steinke, Nasr, Jagielski: Privacy Auditing with One (1) Training Run, NeurIPS 2023 (arXiv 2305.08846), Theorem 5.2
    for any (epsilon, delta)-private training in which each canary was included by a coin of its own.

    >>> found = one_run_audit([*range(100, 200), *range(100)], [True] * 100 + [False] * 100)
    >>> round(found.epsilon, 2), round(found.ceiling, 2), found.guesses, found.right
    (3.69, 3.69, 200, 200)
    """
    values, members = checked(scores, included)
    tried = guess_counts(len(values))
    level = (1 - confidence) / len(tried)
    found = []
    for guesses in tried:
        right = right_guesses(values, members, guesses)
        found.append((epsilon_from_guesses(len(values), guesses, right, delta, 1 - level), guesses, right))
    epsilon, guesses, right = max(found)
    return LowerBound(epsilon, ceiling(guesses, 1 - level), len(values), guesses, right, delta, confidence)


def checked(scores: ArrayLike, included: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    """Both as arrays. Raises ValueError where they are not one finite score and one bool for each canary."""
    values, members = np.asarray(scores, dtype=np.float64), np.asarray(included, dtype=bool)
    if values.shape != members.shape or values.ndim != 1 or len(values) < 2:
        raise ValueError(
            f"expected one score and one bool for each of 2 canaries or more, found {values.shape} and {members.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError("a score is not finite")
    return values, members


def guess_counts(canaries: int) -> list[int]:
    """The even numbers of guesses that are tried on so many canaries."""
    return sorted({max(2, 2 * int(share * canaries / 2)) for share in GUESSES})


def right_guesses(scores: Floats, included: NDArray[np.bool_], guesses: int) -> int:
    """How many guesses are right: the highest scores as included, as many of the lowest as not."""
    order = np.argsort(scores, kind="stable")
    half = guesses // 2
    return int(included[order[-half:]].sum() + (~included[order[:half]]).sum())


def epsilon_from_guesses(
    canaries: int, guesses: int, right: int, delta: float = 0.0, confidence: float = 0.95
) -> float:
    """The largest epsilon under which so many right guesses would be too unlikely; 0 if there is none.

    >>> round(epsilon_from_guesses(1000, 100, 100), 3), round(epsilon_from_guesses(1000, 100, 95, 1e-5), 3)
    (3.493, 2.165)
    """
    if likelihood(canaries, guesses, right, 0.0, delta) > 1 - confidence:
        return 0.0
    if likelihood(canaries, guesses, right, LARGEST, delta) <= 1 - confidence:
        return LARGEST
    return float(
        brentq(
            lambda epsilon: likelihood(canaries, guesses, right, epsilon, delta) - (1 - confidence),
            0.0,
            LARGEST,
            xtol=1e-9,
        )
    )


def likelihood(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The most that the chance of `right` right guesses or more can be under (epsilon, delta)."""
    truthful = float(expit(epsilon))
    at_least = float(binom.sf(right - 1, guesses, truthful))
    if delta == 0 or right == 0:
        return min(1.0, at_least)
    steps = np.arange(1, right + 1)
    below = binom.cdf(right - 1, guesses, truthful) - binom.cdf(right - steps - 1, guesses, truthful)
    return min(1.0, at_least + 2 * canaries * delta * float((below / steps).max()))


def ceiling(guesses: int, confidence: float = 0.95) -> float:
    """What so many guesses show at most, all of them right.

    >>> [round(ceiling(guesses), 2) for guesses in (50, 100, 200, 1000, 10000)]
    [2.78, 3.49, 4.19, 5.81, 8.11]
    """
    return float(logit((1 - confidence) ** (1 / guesses)))

"""Means with intervals. Images of one victim are not independent, so victims are what is resampled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; None where there is nothing to compute it from."""

    mean: float | None
    low: float | None
    high: float | None


def bootstrap_mean(
    values: ArrayLike, victims: ArrayLike, *, samples: int = 2000, seed: int, level: float = 0.95
) -> Interval:
    """Mean over images, with a percentile interval that resamples whole victims.

    `values` (n,) are finite numbers, `victims` (n,) says whose they are. Without values there is no mean; with one
    victim there is a mean but no interval, because nothing is known about how victims differ. Percentile intervals of
    a handful of victims are somewhat too narrow. Raises ValueError where a value is not finite.

    >>> bootstrap_mean([1.0, 3.0], [0, 0], seed=0)
    Interval(mean=2.0, low=None, high=None)
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError("a mean with an interval needs finite values")
    if numbers.size == 0:
        return Interval(None, None, None)
    sums, counts = _per_victim(numbers, victims)
    mean = float(numbers.mean())
    if len(counts) == 1:
        return Interval(mean, None, None)
    drawn = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1.0 / len(counts)), size=samples)
    means = (drawn @ sums) / (drawn @ counts)
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(mean, min(float(low), mean), max(float(high), mean))


def success_rate(
    success: ArrayLike, victims: ArrayLike, *, samples: int = 2000, seed: int, level: float = 0.95
) -> Interval:
    """Share of successful images, with an interval over victims.

    Resampling says nothing where all images succeeded or none did; there the interval is the exact binomial one
    (Clopper and Pearson 1934) for that many victims, so that 0 of 16 reads as [0, 0.21] and not as [0, 0]. One victim
    has no interval.

    >>> interval = success_rate([False] * 16, range(16), seed=0)
    >>> interval.low, round(interval.high, 3)
    (0.0, 0.206)
    """
    hits = np.asarray(success, dtype=bool)
    number = len(np.unique(np.asarray(victims)))
    if number > 1 and (hits.all() or not hits.any()):
        bound = binomtest(number if hits.all() else 0, number).proportion_ci(confidence_level=level, method="exact")
        return Interval(float(hits.mean()), float(bound.low), float(bound.high))
    return bootstrap_mean(hits, victims, samples=samples, seed=seed, level=level)


def paired_difference(
    a: ArrayLike, b: ArrayLike, victims: ArrayLike, *, samples: int = 2000, seed: int, level: float = 0.95
) -> Interval:
    """Mean of a - b over the same images, with an interval that resamples victims."""
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return bootstrap_mean(difference, victims, samples=samples, seed=seed, level=level)


def success_curve(ssim_values: ArrayLike, thresholds: ArrayLike) -> Floats:
    """Success rate at every SSIM threshold: (n,) and (t,) -> (t,).

    A failed or blocked image is a NaN and counts as not successful at any threshold. No images give NaN.

    >>> success_curve([0.95, 0.5, float("nan"), 0.2], [0.1, 0.9]).tolist()
    [0.75, 0.25]
    """
    values, at = np.asarray(ssim_values, dtype=np.float64), np.asarray(thresholds, dtype=np.float64)
    if values.size == 0:
        return np.full(at.shape, np.nan)
    return np.asarray((values[None, :] >= at[:, None]).mean(axis=1), dtype=np.float64)


def median(values: ArrayLike) -> float | None:
    """Median, None without values."""
    numbers = np.asarray(values, dtype=np.float64)
    return float(np.median(numbers)) if numbers.size else None


def _per_victim(values: Floats, victims: ArrayLike) -> tuple[Floats, Floats]:
    """Sum and number of values of every victim."""
    _, which = np.unique(np.asarray(victims), return_inverse=True)
    return np.bincount(which, weights=values).astype(np.float64), np.bincount(which).astype(np.float64)

"""How well a classifier does on held-out images: balanced accuracy and area under the curve, with intervals.

Outputs are (n, classes) before softmax, targets int64 (n,), or 0/1 (n, classes) for several labels per image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medpfl.metrics.statistics import Interval

Floats = NDArray[np.float64]

UTILITY = ("balanced_accuracy", "auc")
"""What is measured on held-out images."""

SAMPLES = 500
"""Bootstrap samples that are kept of each measured model."""


@dataclass(frozen=True)
class Classified:
    """A model's numbers on its held-out images, and the same on `SAMPLES` resamples of these images.

    recalls: the share of each class that is found. Equal targets and groups are resampled alike for every model, so
    that differences of models are paired.
    """

    values: Mapping[str, float]
    resampled: Mapping[str, tuple[float, ...]]
    recalls: tuple[float | None, ...]


def balanced_accuracy(outputs: ArrayLike, targets: ArrayLike) -> float:
    """Mean over classes of the share that is recognized; for several labels, mean over labels of both shares' mean.

    A class without an image is left out. Guessing gives 1 / classes, or 0.5 for several labels.

    >>> balanced_accuracy([[2.0, 1.0], [2.0, 1.0], [0.0, 1.0]], [0, 0, 1])
    1.0
    """
    shown = _Shown.read(outputs, targets)
    return float(_balanced_accuracy(shown, shown.once)[0])


def area_under_curve(outputs: ArrayLike, targets: ArrayLike) -> float:
    """Area under the ROC curve: each class against the rest by its softmax share, mean over classes (or labels).

    The share of pairs of one image in the class and one outside that are in the right order, ties counting half.
    Classes without images on either side are left out. Guessing gives 0.5.

    >>> area_under_curve([[2.0, 1.0], [1.0, 1.0], [0.0, 1.0]], [0, 0, 1])
    1.0
    """
    shown = _Shown.read(outputs, targets)
    return float(_area_under_curve(shown, shown.once)[0])


def classified(outputs: ArrayLike, targets: ArrayLike, groups: Sequence[str] | None = None) -> Classified:
    """All numbers of one model. groups: the patient of each image, resampled as a whole; each its own without."""
    shown = _Shown.read(outputs, targets)
    weights = _resamples(shown.truth, groups)
    measures = {"balanced_accuracy": _balanced_accuracy, "auc": _area_under_curve}
    recalls = _recalls(shown, shown.once)[0].tolist()
    return Classified(
        values={name: float(measure(shown, shown.once)[0]) for name, measure in measures.items()},
        resampled={name: tuple(measure(shown, weights).tolist()) for name, measure in measures.items()},
        recalls=tuple(None if recall != recall else recall for recall in recalls),
    )


def over_seeds(
    values: Sequence[float], resampled: Sequence[Sequence[float]], *, seed: int = 0, level: float = 0.95
) -> Interval:
    """The mean over runs that differ in their seed, with an interval that resamples runs and held-out images.

    values: one number per run. resampled: the same on resamples of the held-out images (`Classified`), run by run.

    >>> over_seeds([0.5], [[0.4, 0.6]]).mean
    0.5
    """
    if not values:
        return Interval(None, None, None)
    mean, table = float(np.mean(values)), np.asarray(resampled, dtype=np.float64)
    if table.size == 0:
        return Interval(mean, None, None)
    rng = np.random.default_rng(seed)
    runs, samples = table.shape
    repeats = 4
    drawn = rng.integers(runs, size=(repeats, samples, runs))
    means = table[drawn, np.arange(samples)[None, :, None]].mean(axis=2)
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(mean, min(float(low), mean), max(float(high), mean))


@dataclass(frozen=True)
class _Shown:
    """Held-out images: scores, 0/1 truth and 0/1 decisions, (n, classes) each. single: one class per image."""

    scores: Floats
    truth: Floats
    chosen: Floats
    single: bool

    @property
    def once(self) -> Floats:
        """Weights that count every image once, (1, n)."""
        return np.ones((1, len(self.scores)))

    @staticmethod
    def read(outputs: ArrayLike, targets: ArrayLike) -> _Shown:
        """Softmax shares and the largest one where images have one class (ties share), else outputs and their sign.

        Outputs that are not finite rank nothing: the model has broken down there, and its image counts as undecided.
        """
        scores, labels = np.asarray(outputs, dtype=np.float64), np.asarray(targets)
        scores = np.where(np.isfinite(scores).all(axis=1, keepdims=True), scores, 0.0)
        if labels.ndim == 2:
            return _Shown(scores, labels.astype(np.float64), (scores > 0).astype(np.float64), False)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        best = scores == scores.max(axis=1, keepdims=True)
        truth = np.eye(scores.shape[1])[labels.astype(np.int64)]
        return _Shown(shares / shares.sum(axis=1, keepdims=True), truth, best / best.sum(axis=1, keepdims=True), True)


def _recalls(shown: _Shown, weights: Floats) -> Floats:
    """The share of each class that is found (samples, classes); NaN where there is none of it."""
    return np.asarray((weights @ (shown.truth * shown.chosen)) / _counts(weights @ shown.truth), dtype=np.float64)


def _balanced_accuracy(shown: _Shown, weights: Floats) -> Floats:
    """For each row of weights (samples, n) over images."""
    recalls = _recalls(shown, weights)
    if shown.single:
        return _mean_of_known(recalls)
    others = 1 - shown.truth
    return _mean_of_known((recalls + (weights @ (others * (1 - shown.chosen))) / _counts(weights @ others)) / 2)


def _area_under_curve(shown: _Shown, weights: Floats) -> Floats:
    classes = range(shown.truth.shape[1])
    areas = [_one_area(shown.scores[:, name], shown.truth[:, name], weights) for name in classes]
    return _mean_of_known(np.stack(areas, axis=1))


def _one_area(scores: Floats, truth: Floats, weights: Floats) -> Floats:
    order = np.argsort(scores, kind="stable")
    inside, outside = weights[:, order] * truth[order], weights[:, order] * (1 - truth[order])
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    inside, outside = np.add.reduceat(inside, starts, axis=1), np.add.reduceat(outside, starts, axis=1)
    below = np.cumsum(outside, axis=1) - outside
    pairs = inside.sum(axis=1) * outside.sum(axis=1)
    return np.asarray((inside * (below + outside / 2)).sum(axis=1) / _counts(pairs), dtype=np.float64)


def _counts(values: Floats) -> Floats:
    """NaN for nothing, so that a share of nothing is unknown."""
    return np.where(values > 0, values, np.nan)


def _mean_of_known(values: Floats) -> Floats:
    """The mean over classes (samples, classes), of those that are known; NaN where none is."""
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0.0).sum(axis=1), known.sum(axis=1)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan), dtype=np.float64)


def _resamples(truth: Floats, groups: Sequence[str] | None) -> Floats:
    """How often each image is in each of `SAMPLES` bootstrap samples (samples, n): patients drawn within classes."""
    names = [str(place) for place in range(len(truth))] if groups is None else list(groups)
    strata: dict[tuple[float, ...], dict[str, list[int]]] = {}
    home: dict[str, tuple[float, ...]] = {}
    for place, name in enumerate(names):
        stratum = home.setdefault(name, tuple(truth[place]))
        strata.setdefault(stratum, {}).setdefault(name, []).append(place)
    rng = np.random.default_rng(0)
    weights = np.zeros((SAMPLES, len(truth)))
    for stratum in sorted(strata):
        patients = list(strata[stratum].values())
        drawn = rng.multinomial(len(patients), np.full(len(patients), 1.0 / len(patients)), size=SAMPLES)
        for number, places in enumerate(patients):
            weights[:, places] = drawn[:, [number]]
    return weights

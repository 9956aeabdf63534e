"""Rates of a detector over independent runs: exact intervals, thresholds from other runs, predictive values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from detector.nets import DENSE_FIRST
from detector.rows import Row
from detector.scores import LIMITS

LOOKS: Mapping[str, tuple[str, ...]] = {
    "tensors": ("structure",),
    "model at work": ("structure", "behavior"),
    "update": ("gate",),
    "all three": ("structure", "behavior", "gate"),
    "and the agreed model": ("structure", "behavior", "gate", "agreed"),
    "and a reference": ("structure", "behavior", "gate", "agreed", "reference"),
}
"""What is looked at, and the prefixes of the scores that belong to it."""

SHARES = frozenset(
    {
        *("proportional_rows", "proportional_columns", "low_rank", "half_negative_rows", "copying_kernels", "excess"),
        *("equal_classes", "more_than_chance", "units_of_one_image", "sorted"),
        *("replaced_tensor", "other_distribution"),
    }
)
"""Scores between 0 and 1; the others are ratios, and compared as logarithms."""


@dataclass(frozen=True)
class Rate:
    """`hits` of `count`, with the exact (Clopper-Pearson) interval of 95%."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        """The share; NaN of nothing."""
        return self.hits / self.count if self.count else math.nan

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper end."""
        if not self.count:
            return math.nan, math.nan
        found = binomtest(self.hits, self.count).proportion_ci(confidence_level=0.95, method="exact")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        """`12 of 300 = 4.0% [2.1%, 6.9%]`."""
        if not self.count:
            return "-"
        low, high = self.bounds
        return f"{self.hits} of {self.count} = {self.value:.1%} [{low:.1%}, {high:.1%}]"


def rate(found: Iterable[bool]) -> Rate:
    """How many are true."""
    values = list(found)
    return Rate(sum(values), len(values))


def distance(name: str, score: float) -> float:
    """How far a score is beyond its shipped threshold, from -1 (no sign at all) to 1 (as bad as can be); 0 is at it."""
    limit = LIMITS[name][0]
    if limit <= 0:
        return 1.0 if score > limit else -1.0
    if name.rpartition(".")[2] in SHARES:
        return (score - limit) / (1.0 - limit) if score > limit else max(-1.0, score / limit - 1.0)
    return max(-1.0, min(1.0, math.log10(max(score, 1e-12) / limit)))


def suspicion(row: Row, look: str) -> float:
    """The sum of all distances above 0 of the checks that tell crafted models from honest ones; without, the largest.

    It is above 0 exactly where the look's verdict with shipped thresholds is `crafted`.
    """
    values = [
        distance(name, score)
        for name, score in row.values.items()
        if name in LIMITS and name.partition(".")[0] in LOOKS[look] and LIMITS[name][1] == "crafted"
    ]
    above = [value for value in values if value > 0]
    return sum(above) if above else max(values, default=-1.0)


def called(row: Row, look: str, word: str) -> bool:
    """Whether a look's verdict with shipped thresholds is this one."""
    return word in {getattr(row, prefix) for prefix in LOOKS[look]}


def leaks_by_design(row: Row) -> bool:
    """Whether the run's net has a dense layer first, so that a guard which says that it leaks is right."""
    return row.group in DENSE_FIRST


def fixed_threshold(honest: Sequence[float], crafted: Sequence[float], alarms: float) -> float:
    """The suspicion from which on a run is an alarm, fixed on these runs so that `alarms` of honest ones are.

    The rank that a fresh honest run exceeds with that chance (conformal); with too few runs for it, an exponential tail
    through their highest tenth. From there half of the way to where crafted runs begin (their lowest hundredth), if
    these lie above.
    """
    ordered = sorted(honest, reverse=True)
    allowed = math.floor(alarms * (len(ordered) + 1)) - 1
    bound = ordered[allowed] if allowed >= 0 else _tail(ordered, alarms)
    begin = sorted(crafted)[len(crafted) // 100] if crafted else bound
    return (bound + begin) / 2 if begin > bound else bound


def _tail(ordered: Sequence[float], alarms: float) -> float:
    """What a share `alarms` lies above, if the highest tenth falls off exponentially."""
    highest = max(1, len(ordered) // TAIL)
    start = ordered[highest]
    mean_excess = sum(value - start for value in ordered[:highest]) / highest
    return start + mean_excess * math.log(highest / len(ordered) / alarms)


TAIL = 10


def predictive_value(detection: float, alarms: float, base: float) -> float:
    """The share of alarms that are right where a share `base` of runs is crafted."""
    right = detection * base
    total = right + alarms * (1.0 - base)
    return right / total if total else math.nan


def left_out(
    honest: Sequence[Row], crafted: Sequence[Row], look: str, alarms: float
) -> tuple[dict[str, Rate], dict[str, Rate]]:
    """False alarms per architecture and detection per family, each with a threshold fixed on all others."""
    scores = {row.run: suspicion(row, look) for row in (*honest, *crafted)}

    def others(rows: Sequence[Row], group: str, of: Callable[[Row], str]) -> list[float]:
        return [scores[row.run] for row in rows if of(row) != group]

    false, found = {}, {}
    for group in sorted({row.group for row in honest}):
        limit = fixed_threshold(others(honest, group, _group), [scores[row.run] for row in crafted], alarms)
        false[group] = rate(scores[row.run] > limit for row in honest if row.group == group)
    for group in sorted({row.group for row in crafted}):
        limit = fixed_threshold([scores[row.run] for row in honest], others(crafted, group, _group), alarms)
        found[group] = rate(scores[row.run] > limit for row in crafted if row.group == group)
    return false, found


def _group(row: Row) -> str:
    return row.group


def total(rates: Mapping[str, Rate]) -> Rate:
    """All together."""
    return Rate(sum(one.hits for one in rates.values()), sum(one.count for one in rates.values()))

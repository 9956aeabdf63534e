"""The noise of a filter, measured by calling it again and again on the same update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from medpfl.audit.filters.samples import Sample, sample_update
from medpfl.audit.filters.subject import Subject, call
from medpfl.core.domain import Tensors

CALLS = 32
"""Calls on one update to measure noise by."""

STRENGTHS = (1e-3, 1.0, 1e3)
"""Factors of the update at which noise must be the same, if it is calibrated to anything but the update itself."""

COUNTERS = (10, 1_000_000)
"""Batch-norm counters at which it must be the same."""

TOLERANCE = 0.05
"""Relative difference of standard deviations that still counts as equal."""


@dataclass(frozen=True)
class Noise:
    """What differs between calls on the same update.

    deviations: standard deviation of the noise per floating tensor; all equal up to chance are given as one number.
    noised: share of trainable entries that have noise. kurtosis: excess, 0 for normal and 3 for Laplace noise. by_strength,
    by_counter: standard deviation over all trainable entries by factor of the update and by batch-norm counter. frozen:
    the noise is the same after every new start of the filter. pattern: without noise, an update of zeros leaves as
    something else. error: what the filter raised.
    """

    deviations: Mapping[str, float] = field(default_factory=dict)
    noised: float = 0.0
    kurtosis: float = 0.0
    by_strength: Mapping[float, float] = field(default_factory=dict)
    by_counter: Mapping[int, float] = field(default_factory=dict)
    frozen: bool = False
    pattern: bool = False
    error: str = ""

    @property
    def present(self) -> bool:
        """Whether there is any noise on trainable entries."""
        return self.noised > 0

    @property
    def deviation(self) -> float:
        """Standard deviation over all trainable entries of the update as it is."""
        return self.by_strength.get(1.0, 0.0)

    @property
    def kind(self) -> str:
        """`gaussian`, `laplace` or `other`, by kurtosis; empty without noise."""
        if not self.present:
            return ""
        return "gaussian" if abs(self.kurtosis) < 0.5 else "laplace" if 2 < self.kurtosis < 4 else "other"

    @property
    def follows_update(self) -> bool:
        """Whether its size depends on the update."""
        return _differ(self.by_strength.values())

    @property
    def follows_counter(self) -> bool:
        """Whether its size depends on batch norm's counter."""
        return _differ(self.by_counter.values())


def measure_noise(subject: Subject) -> Noise:
    """Calls one filter `CALLS` times at every strength and counter."""
    sample = sample_update()
    draws = {factor: _draws(subject, sample.scaled(factor)) for factor in STRENGTHS}
    counted = {batches: _draws(subject, sample.counting(batches)) for batches in COUNTERS}
    plain = draws[1.0]
    if isinstance(plain, str):
        return Noise(error=plain)
    spread = {name: plain[name].std(dim=0) for name in plain}
    residuals = torch.cat([
        ((plain[name] - plain[name].mean(dim=0)) / spread[name].square().mean().sqrt()).flatten()
        for name in sample.trainable if name in plain and float(spread[name].max()) > 0
    ] or [torch.zeros(0)])  # fmt: skip
    noised = sum(int((spread[name] > 0).sum()) for name in sample.trainable if name in spread)
    total = sum(tensor.numel() for tensor in sample.trainable.values())
    starts = [call(subject.made(), sample.tensors, arrays=subject.arrays).sent for _ in range(2)]
    zeros = call(subject.made(), sample.scaled(0.0).tensors, arrays=subject.arrays).sent
    return Noise(
        deviations=_deviations(plain),
        noised=noised / total,
        kurtosis=_kurtosis(residuals),
        by_strength={factor: _overall(found, sample) for factor, found in draws.items() if not isinstance(found, str)},
        by_counter={number: _overall(found, sample) for number, found in counted.items() if not isinstance(found, str)},
        frozen=noised > 0 and _same(starts[0], starts[1]),
        pattern=noised == 0 and any(bool((zeros[name] != 0).any()) for name in sample.trainable if name in zeros),
    )


def _draws(subject: Subject, sample: Sample) -> dict[str, Tensor] | str:
    """Name -> what was sent in every call (calls, *shape) in double precision, of floating tensors; or an error."""
    made, found = subject.made(), []
    for number in range(CALLS):
        result = call(made, sample.tensors, arrays=subject.arrays, seed=number)
        if result.error:
            return result.error
        found.append(result.sent)
    kept = [name for name, tensor in sample.floating.items()
            if all(name in sent and sent[name].shape == tensor.shape for sent in found)]  # fmt: skip
    return {name: torch.stack([sent[name].double() for sent in found]) for name in kept}


def _deviations(draws: Tensors) -> dict[str, float]:
    """Per tensor, or the same number for all where they differ by no more than chance."""
    variances = {name: tensor.var(dim=0) for name, tensor in draws.items()}
    each = {name: math.sqrt(float(variance.mean())) for name, variance in variances.items()}
    entries = torch.cat([variance.flatten() for variance in variances.values()])
    pooled = math.sqrt(float(entries.mean()))
    if pooled == 0:
        return each
    for name, variance in variances.items():
        allowed = 5 / math.sqrt(2 * CALLS * variance.numel()) + 0.01
        if each[name] == 0 or abs(math.log(each[name] / pooled)) > allowed:
            return each
    return dict.fromkeys(each, pooled)


def _kurtosis(residuals: Tensor) -> float:
    if not len(residuals):
        return 0.0
    spread = residuals.square().mean()
    return float(residuals.pow(4).mean() / spread**2 - 3) * (CALLS + 1) / (CALLS - 1) if spread > 0 else 0.0


def _overall(draws: Tensors, sample: Sample) -> float:
    found = [draws[name].var(dim=0).flatten() for name in sample.trainable if name in draws]
    return math.sqrt(float(torch.cat(found).mean())) if found else 0.0


def _same(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _differ(values: Iterable[float]) -> bool:
    found = list(values)
    return bool(found) and max(found) > (1 + TOLERANCE) * min(found)

"""How far an update can move what is sent: a filter that bounds nothing guarantees nothing, whatever noise it adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.audit.filters.behavior import joined
from medpfl.audit.filters.noise import Noise
from medpfl.audit.filters.samples import Sample, sample_update
from medpfl.audit.filters.subject import Subject, call
from medpfl.core.domain import Tensors
from medpfl.core.seeding import generator

HUGE = 1e9
"""Factor of the update in most probes."""

UNPAIRED_CALLS = 128
"""Calls whose mean is taken where noise cannot be taken out."""

LARGE = 1e6
"""Factor that already exceeds every clipping norm in use; what `HUGE` moves more, nothing bounds."""


@dataclass(frozen=True)
class Sensitivity:
    """How far trainable entries of what is sent lie from what is sent for an update of zeros, the noise left out.

    norm, absolute: the farthest that any probe moved them, as L2 norm and as sum of absolute values. growth: of the
    norm, from an update times `LARGE` to the same times `HUGE`: 1 where it is bounded, 1000 where it is not. distance,
    absolute_distance: the farthest in standard deviations of the noise (L2) and in scales of Laplace noise (L1);
    infinite where entries without noise moved. probe: the one that moved them farthest. paired: whether noise could be
    taken out exactly, because the filter draws it from a generator that was seeded; else all distances are lower ends of
    95% intervals. error: what the filter raised.
    """

    norm: float = 0.0
    absolute: float = 0.0
    growth: float = 1.0
    distance: float = 0.0
    absolute_distance: float = 0.0
    probe: str = ""
    paired: bool = True
    error: str = ""

    @property
    def bounded(self) -> bool:
        """Whether what is sent stays within a ball, whatever the update, as far as probes tell."""
        return not self.error and self.growth < 1.01


def measure_sensitivity(subject: Subject, noise: Noise) -> Sensitivity:
    """Sends very large updates of several kinds through fresh filters."""
    sample = sample_update()
    paired = _paired(subject, sample)
    calls = 1 if paired else UNPAIRED_CALLS
    zeros = _mean(subject, sample.scaled(0.0), calls)
    if isinstance(zeros, str):
        return Sensitivity(error=zeros)
    found: dict[str, _Distance] = {}
    for name, probe in _probes(sample, few=not paired):
        sent = _mean(subject, probe, calls)
        if isinstance(sent, str):
            return Sensitivity(error=f"{name}: {sent}")
        moved = {key: sent[key] - zeros[key] for key in sample.trainable if key in sent and key in zeros}
        found[name] = _exactly(moved, noise) if paired else _at_least(moved, probe.trainable, noise)
    if not all(math.isfinite(distance.norm) for distance in found.values()):
        return Sensitivity(error="what is sent for a very large update is not finite")
    farthest = max(found, key=lambda name: found[name].norm)
    huge, large = found[_scaled_name(HUGE)], found[_scaled_name(LARGE)]
    grows = large.norm > 0 and huge.norm - large.norm > 5 * large.uncertain
    return Sensitivity(
        norm=found[farthest].norm,
        absolute=max(distance.absolute for distance in found.values()),
        growth=huge.norm / large.norm if grows else 1.0,
        distance=max(distance.deviations for distance in found.values()),
        absolute_distance=max(distance.scales for distance in found.values()),
        probe=farthest,
        paired=paired,
    )


@dataclass(frozen=True)
class _Distance:
    """Of what is sent for a probe from what is sent for zeros: L2 norm and its standard error, sum of absolute values,
    and both in units of the noise."""

    norm: float
    absolute: float
    deviations: float
    scales: float
    uncertain: float = 0.0


def _exactly(moved: Tensors, noise: Noise) -> _Distance:
    """Where the noise was the same in both."""
    deviations = scales = 0.0
    for name, tensor in moved.items():
        deviation = noise.deviations.get(name, 0.0)
        if not bool(tensor.any()):
            continue
        if deviation == 0:
            deviations = scales = math.inf
            break
        deviations += float(tensor.square().sum()) / deviation**2
        scales += float(tensor.abs().sum()) / (deviation / math.sqrt(2))
    vector = joined(moved)
    return _Distance(float(vector.norm()), float(vector.abs().sum()), math.sqrt(deviations), scales)


def _at_least(moved: Tensors, probe: Tensors, noise: Noise) -> _Distance:
    """Where noise is left in both: along the probe's direction, less two standard errors, so that it is not overstated."""
    vector, direction = joined(moved), joined({name: probe[name] for name in moved})
    uncertain = noise.deviation * math.sqrt(2 / UNPAIRED_CALLS)
    along = abs(float(vector @ direction / direction.norm())) if float(direction.norm()) > 0 else 0.0
    norm = max(0.0, along - 2 * uncertain)
    absolute = norm * float(direction.abs().sum() / direction.norm())
    deviation = noise.deviation or 1.0
    return _Distance(norm, absolute, norm / deviation, absolute / (deviation / math.sqrt(2)), uncertain)


def _probes(sample: Sample, few: bool) -> Iterator[tuple[str, Sample]]:
    draws = generator("filter probes")
    yield _scaled_name(LARGE), sample.scaled(LARGE)
    yield _scaled_name(HUGE), sample.scaled(HUGE)
    yield "a random direction", sample.mapped(lambda one: HUGE * torch.randn(one.shape, generator=draws))
    yield "random signs", sample.mapped(lambda one: HUGE * torch.randn(one.shape, generator=draws).sign())
    if few:
        return
    yield "one entry", _only(sample, max(sample.trainable, key=lambda name: sample.trainable[name].numel()), _spike)
    for name in sample.trainable:
        yield f"only {name}", _only(sample, name, lambda one: HUGE * torch.ones_like(one))


def _only(sample: Sample, wanted: str, change: Callable[[Tensor], Tensor]) -> Sample:
    zero = sample.scaled(0.0)
    return Sample({**zero.trainable, wanted: change(sample.trainable[wanted])}, zero.buffers, zero.counters)


def _spike(tensor: Tensor) -> Tensor:
    found = torch.zeros_like(tensor).flatten()
    found[0] = HUGE
    return found.reshape(tensor.shape)


def _scaled_name(factor: float) -> str:
    return f"the update times {factor:g}"


def _paired(subject: Subject, sample: Sample) -> bool:
    """Whether equal seeds give equal noise in two fresh filters."""
    first, second = (call(subject.made(), sample.tensors, arrays=subject.arrays, seed=7).sent for _ in range(2))
    return bool(first) and all(name in second and torch.equal(first[name], second[name]) for name in first)


def _mean(subject: Subject, sample: Sample, calls: int) -> dict[str, Tensor] | str:
    total: dict[str, Tensor] = {}
    for number in range(calls):
        result = call(subject.made(), sample.tensors, arrays=subject.arrays, seed=number)
        if result.error:
            return result.error
        for name, tensor in result.sent.items():
            total[name] = total.get(name, torch.zeros(())) + tensor.double() / calls
    return total

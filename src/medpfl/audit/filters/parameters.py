"""What a filter does with settings that make no sense: refuse, or let the update pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from medpfl.audit.filters.behavior import share_changed
from medpfl.audit.filters.samples import Sample, sample_update
from medpfl.audit.filters.subject import Subject, call
from medpfl.models.probe import summary_of

BAD_WORDS = ("percent", "quantile")
"""In names of settings that have an upper end."""


@dataclass(frozen=True)
class Trial:
    """One setting with one bad value: `refused` (with the error), `unchanged`, `noiseless` or `applied`."""

    setting: str
    value: float
    outcome: str
    error: str = ""

    @property
    def open(self) -> bool:
        """Whether the filter let the update pass although the setting makes no sense."""
        return self.outcome == "unchanged" or (self.outcome == "noiseless" and self.value != 0)


def try_parameters(subject: Subject, noisy: bool) -> tuple[Trial, ...]:
    """Every numeric setting at zero, negative, NaN, and beyond its end where it has one. noisy: whether there is noise
    at the given settings."""
    sample, found = sample_update(), []
    for setting, value in subject.numbers.items():
        for bad in _bad_values(setting, value):
            outcome, error = _outcome(subject, sample, setting, bad, noisy)
            found.append(Trial(setting, bad, outcome, error))
    return tuple(found)


def _bad_values(setting: str, value: float) -> list[float]:
    values: list[float] = [0, -1] if isinstance(value, int) else [0.0, -1.0, math.nan]
    if any(word in setting.lower() for word in BAD_WORDS):
        values.append(type(value)(101))
    return values


def _outcome(subject: Subject, sample: Sample, setting: str, value: float, noisy: bool) -> tuple[str, str]:
    try:
        made = subject.made(**{setting: value})
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's filter may raise anything
        return "refused", summary_of(error)
    calls = [call(made, sample.tensors, arrays=subject.arrays, seed=seed) for seed in range(2)]
    for found in calls:
        if found.error:
            return "refused", found.error
    if share_changed(sample, calls[0]) == 0:
        return "unchanged", ""
    same = all(torch.equal(calls[0].sent[name], calls[1].sent.get(name, torch.zeros(0))) for name in calls[0].sent)
    return ("noiseless" if noisy and same else "applied"), ""

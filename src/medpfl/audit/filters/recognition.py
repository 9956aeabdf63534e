"""Which mechanism a filter is, as far as its behavior tells: what an attacker who studies the filter knows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from medpfl.audit.filters.behavior import Behavior
from medpfl.audit.filters.noise import Noise
from medpfl.audit.filters.samples import sample_update
from medpfl.audit.filters.sensitivity import Sensitivity
from medpfl.audit.filters.subject import Subject, call
from medpfl.core.mechanisms import GaussianNoise, LaplaceNoise, Mechanism

MOST_LEVELS = 512
"""Different values of one tensor up to which it counts as quantized."""


@dataclass(frozen=True)
class Recognized:
    """What was recognized, each as a short sentence; `mechanism` is what an adaptive attacker is told of it, if any."""

    words: tuple[str, ...]
    mechanism: Mechanism | None = None


def recognize(subject: Subject, found: Behavior, noise: Noise, sensitivity: Sensitivity) -> Recognized:
    """Noise by repeated calls, clipping by very large updates, sparsity, signs and levels by what is left."""
    words = []
    mechanism: Mechanism | None = None
    if noise.present:
        size = f"standard deviation {noise.deviation:.3g}"
        words.append(f"{noise.kind if noise.kind != 'other' else 'some'} noise of {size}")
        if noise.kind == "gaussian":
            mechanism = GaussianNoise(noise.deviation)
        elif noise.kind == "laplace":
            mechanism = LaplaceNoise(noise.deviation / math.sqrt(2))
    if found.left < 0.98 and found.changed > 0 and not noise.present:
        words.append(f"{1 - found.left:.0%} of the entries put to zero")
    if sensitivity.bounded and sensitivity.norm > 0:
        words.append(f"what is sent is bounded: no update moved it farther than {sensitivity.norm:.4g}")
    words += _levels(subject, noise)
    return Recognized(tuple(words), mechanism)


def _levels(subject: Subject, noise: Noise) -> list[str]:
    sample = sample_update()
    result = call(subject.made(), sample.tensors, arrays=subject.arrays, seed=0)
    if noise.present or result.error:
        return []
    name = max(sample.trainable, key=lambda one: sample.trainable[one].numel())
    if name not in result.sent or result.sent[name].numel() < MOST_LEVELS * 2:
        return []
    values = torch.unique(result.sent[name])
    signs = torch.equal(torch.sign(result.sent[name]), torch.sign(sample.trainable[name])) and len(values) <= 3
    if signs:
        return ["only signs are left"]
    most = min(MOST_LEVELS, int((result.sent[name] != 0).sum()) // 4)
    return [f"values are rounded to {len(values)} levels"] if 1 < len(values) <= most else []

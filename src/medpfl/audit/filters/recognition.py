"""Which mechanism a filter is, as far as its behavior tells: what an attacker who studies the filter knows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.audit.filters.behavior import Behavior, joined
from medpfl.audit.filters.noise import Noise
from medpfl.audit.filters.samples import Sample, sample_update
from medpfl.audit.filters.sensitivity import LARGE, Sensitivity
from medpfl.audit.filters.subject import Subject, call
from medpfl.core.domain import Tensors
from medpfl.core.mechanisms import (
    Clipped,
    Composed,
    CutOff,
    GaussianNoise,
    LaplaceNoise,
    Mechanism,
    Quantized,
    RandomK,
    Signs,
    TopK,
)

ENLARGED = (1.0, 1e1, 1e2, 1e3, 1e4, 1e6)
"""How many times larger the updates are with which a bound on single entries is looked for."""

AT_BOUND = (0.01, 0.99)
"""Share of the entries sent that must stand at such a bound, at least and at most."""

MOST_LEVELS = 128
"""Levels on either side of zero up to which a tensor counts as quantized."""

MOST_KEPT = 0.98
"""Share of the entries that are sent up to which the others count as put to zero."""

CLOSE = 1e-4
"""Relative difference up to which two numbers count as equal."""


@dataclass(frozen=True)
class Recognized:
    """What was recognized, in words; `mechanism` is what an adaptive attacker is told, None where nothing was."""

    words: tuple[str, ...]
    mechanism: Mechanism | None = None


def recognize(subject: Subject, found: Behavior, noise: Noise, sensitivity: Sensitivity) -> Recognized:
    """Clipping and cuts by larger updates, noise by repeated calls, sparsity, signs and levels by what is left of entries."""
    sample = sample_update()
    result = call(subject.made(), sample.tensors, arrays=subject.arrays, seed=0)
    if result.error or not found.applied or any(name not in result.sent for name in sample.trainable):
        return Recognized(())
    sent = {name: result.sent[name].double() for name in sample.trainable}
    parts: list[tuple[str, Mechanism | None]] = []
    if sensitivity.bounded and sensitivity.norm > 0 and noise.kind != "other":
        keeps = _keeps_direction(subject, sample, sensitivity)
        words = f"no update moved what is sent farther than {sensitivity.norm:.4g}"
        parts.append((f"clipping: {words}", Clipped(sensitivity.norm)) if keeps else (f"bounded: {words}", None))
    if noise.kind == "gaussian":
        parts.append((f"normal noise of standard deviation {noise.deviation:.3g}", GaussianNoise(noise.deviation)))
    elif noise.kind == "laplace":
        scale = noise.deviation / math.sqrt(2)
        parts.append((f"Laplace noise of scale {scale:.3g}", LaplaceNoise(scale)))
    elif not noise.present and (bound := _entry_bound(subject, sample)) is not None:
        zeros = 1 - float((joined(sent) != 0).double().mean())
        sparse = zeros > 1 - MOST_KEPT and _largest_survive(sample.trainable, sent) == "all"
        words = f"; {zeros:.0%} of the entries put to zero before, the smallest of all" if sparse else ""
        parts.append((f"entries cut off at {bound:.3g}{words}", CutOff(bound, sparse)))
    else:
        parts += _compression(sample.trainable, sent, noise)
    known = tuple(mechanism for _, mechanism in parts if mechanism is not None)
    mechanism = None if not known else known[0] if len(known) == 1 else Composed(known)
    return Recognized(tuple(words for words, _ in parts), mechanism)


def _entry_bound(subject: Subject, sample: Sample) -> float | None:
    """The magnitude that no entry exceeds, if larger ones are put to it and smaller ones that are sent stay as they are."""
    for factor in ENLARGED:
        own = sample.scaled(factor)
        result = call(subject.made(), own.tensors, arrays=subject.arrays, seed=0)
        if result.error or any(name not in result.sent for name in sample.trainable):
            return None
        before = joined(own.trainable)
        after = joined({name: result.sent[name].double() for name in sample.trainable})
        bound = float(after.abs().max())
        kept, at_bound = after != 0, after.abs() > bound * (1 - CLOSE)
        if not AT_BOUND[0] <= float(at_bound.double().sum() / kept.double().sum().clamp_min(1)) <= AT_BOUND[1]:
            continue
        cut = bool((before[at_bound].abs() > bound * (1 - CLOSE)).all())
        signs = torch.equal(torch.sign(before[at_bound]), torch.sign(after[at_bound]))
        others = kept & ~at_bound
        same = bool(((after - before)[others].abs() <= CLOSE * before[others].abs()).all())
        if cut and signs and same:
            return bound
    return None


def _keeps_direction(subject: Subject, sample: Sample, sensitivity: Sensitivity) -> bool:
    """Whether a very large update leaves in its own direction; supposed where noise cannot be taken out."""
    if not sensitivity.paired:
        return True
    large, zeros = (
        call(subject.made(), sample.scaled(factor).tensors, arrays=subject.arrays, seed=0).sent
        for factor in (LARGE, 0.0)
    )
    moved = joined({name: large[name].double() - zeros[name].double() for name in sample.trainable})
    own = joined(sample.trainable)
    return float(moved @ own / (moved.norm() * own.norm())) > 1 - CLOSE


def _compression(clean: Tensors, sent: Tensors, noise: Noise) -> list[tuple[str, Mechanism | None]]:
    """Sparsity, signs and levels; random supports differ from call to call, which counts as noise."""
    before, after = joined(clean), joined(sent)
    kept = after != 0
    share = float(kept.double().mean())
    ratios = after[kept] / before[kept] if bool(kept.any()) else after[:0]
    same = len(ratios) > 0 and float(ratios.max() - ratios.min()) < CLOSE * float(ratios.abs().max())
    if share < MOST_KEPT and same:
        words = f"{1 - share:.0%} of the entries put to zero"
        if noise.present:
            return [(f"{words}, drawn at random", RandomK(share, unbiased=float(ratios.mean()) > 1 + CLOSE))]
        if (scope := _largest_survive(clean, sent)) is not None:
            return [(f"{words}, the smallest of {scope}", TopK(share, "global" if scope == "all" else "tensor"))]
        return [(words, None)]
    if noise.present:
        return [(f"some noise of standard deviation {noise.deviation:.3g}", None)]
    if all(
        torch.equal(torch.sign(sent[name]), torch.sign(clean[name].double())) and _one_size(sent[name]) for name in sent
    ):
        return [("only signs are left", Signs(scaled=abs(float(after.abs().max()) - 1) > CLOSE))]
    levels = [_levels(clean[name], tensor) for name, tensor in sent.items() if tensor.numel() >= 4 * MOST_LEVELS]
    if levels and levels[0] is not None and all(one == levels[0] for one in levels):
        return [(f"values are rounded to {levels[0]} levels on either side of zero", Quantized(levels[0]))]
    return []


def _largest_survive(clean: Tensors, sent: Tensors) -> str | None:
    """`all` or `each tensor`, whichever the smallest that survives is larger than all that do not in."""

    def ordered(own: Tensor, left: Tensor) -> bool:
        kept = left != 0
        return bool(kept.all()) or not bool(kept.any()) or float(own[kept].min()) >= float(own[~kept].max())

    if ordered(joined(clean).abs(), joined(sent)):
        return "all"
    each = all(ordered(clean[name].double().abs().flatten(), sent[name].flatten()) for name in sent)
    return "each tensor" if each else None


def _one_size(tensor: Tensor) -> bool:
    sizes = tensor[tensor != 0].abs()
    return not len(sizes) or float(sizes.max() - sizes.min()) <= CLOSE * float(sizes.max())


def _levels(clean: Tensor, sent: Tensor) -> int | None:
    """Levels on either side of zero, if all values are whole multiples of a step and the largest is kept."""
    sizes = torch.unique(sent.abs())
    largest = float(clean.double().abs().max())
    if len(sizes) < 2 or len(sizes) > MOST_LEVELS + 1 or abs(float(sizes[-1]) / largest - 1) > CLOSE:
        return None
    step = float((sizes[1:] - sizes[:-1]).min())
    multiples = sizes / step
    uniform = float((multiples - multiples.round()).abs().max()) < 1e-2
    return round(float(multiples[-1])) if uniform else None

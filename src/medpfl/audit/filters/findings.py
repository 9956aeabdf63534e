"""What was measured, in sentences that need no knowledge of the matter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from medpfl.audit.filters.behavior import ROUNDS, Behavior
from medpfl.audit.filters.claims import TOLERANCE, Claim, Following
from medpfl.audit.filters.leakage import Leakage
from medpfl.audit.filters.noise import COUNTERS, Noise
from medpfl.audit.filters.parameters import Trial
from medpfl.audit.filters.sensitivity import Sensitivity


@dataclass(frozen=True)
class Finding:
    """One sentence. `problem`: do not rely on the filter before it is mended; `note`: to be known; `good`: as it must be."""

    level: Literal["problem", "note", "good"]
    topic: str
    sentence: str


@dataclass(frozen=True)
class Measurements:
    """Everything that was measured of one filter."""

    behavior: Behavior
    noise: Noise
    sensitivity: Sensitivity
    following: Following
    trials: tuple[Trial, ...]
    leakage: tuple[Leakage, ...]


def findings(measured: Measurements, claim: Claim) -> tuple[Finding, ...]:
    """All findings, topic by topic."""
    return (
        *_applied(measured.behavior),
        *_guarantee(measured, claim),
        *_beside(measured.behavior, measured.noise, claim),
        *_settings(measured.trials),
        *_attacks(measured.leakage),
    )


def _applied(found: Behavior) -> Iterator[Finding]:
    topic = "Is it applied?"
    if found.error and not found.applied:
        yield Finding("problem", topic, f"The filter failed on an ordinary update: {found.error}.")
        return
    if not found.applied:
        yield Finding("problem", topic, "The filter was not applied: every trained number left exactly as it came.")
        return
    left = f"{found.changed:.0%} of the trained numbers changed, {found.left:.0%} are not zero"
    direction = (
        f"the direction agrees with the clean update's by a cosine of {found.cosine:.2f} (1 the same, 0 unrelated)"
    )
    yield Finding("good", topic, f"The filter is applied: {left}, and {direction}.")
    if found.error:
        yield Finding("problem", topic, f"It does not last: {found.error}.")
    elif found.last_changed == 0:
        yield Finding("problem", topic, f"It stops: in call {ROUNDS} in a row the update left as it came.")
    if found.not_finite:
        yield Finding("problem", topic, f"What leaves is not finite in {', '.join(found.not_finite)}.")
    if found.reshaped or found.added:
        changed = ", ".join((*found.reshaped, *found.added))
        yield Finding("note", topic, f"What leaves has other tensors or shapes than the update: {changed}.")
    if found.in_place:
        yield Finding("note", topic, "It changes the caller's own numbers, so training goes on from the filtered ones.")


def _guarantee(measured: Measurements, claim: Claim) -> Iterator[Finding]:
    topic = "Does a guarantee follow?"
    followed, rounds = measured.following, f"{claim.rounds} round{'s' if claim.rounds != 1 else ''}"
    if followed.reasons:
        why = "; ".join(followed.reasons)
        if claim.epsilon is None:
            yield Finding("note", topic, f"No formal guarantee follows from what the filter does: {why}.")
        else:
            yield Finding(
                "problem",
                topic,
                f"The claimed epsilon of {claim.epsilon:g} does not follow from what the filter does: {why}.",
            )
        return
    composed, replaced = followed.composed, followed.replaced
    assert composed is not None  # there are no reasons
    assert replaced is not None
    once = f"{_number(composed)} over {rounds} at delta {claim.delta:g}"
    says = (
        f"epsilon is {once}, for all that one client sends, compared with sending nothing; compared with any other "
        f"client's update it is {_number(replaced)}"
    )
    if claim.epsilon is None:
        yield Finding("good", topic, f"By the measured noise and bound {says}.")
        return
    held = composed <= claim.epsilon * (1 + TOLERANCE)
    if not held:
        yield Finding(
            "problem",
            topic,
            f"The claimed epsilon of {claim.epsilon:g} is too low: it is {_number(composed)}. The noise is {_number(followed.multiplier or 0.0)} times "
            f"what one update may change. By the measured noise and bound {says}.",
        )
    else:
        yield Finding(
            "good", topic, f"The claimed epsilon of {claim.epsilon:g} holds: by the measured noise and bound {says}."
        )
    if held and replaced > claim.epsilon * (1 + TOLERANCE):
        yield Finding(
            "note",
            topic,
            "The claim holds only where an update is compared with sending nothing; say so where the claim is made.",
        )
    classical = claim.classical
    if (
        classical is not None
        and claim.epsilon > 1
        and followed.multiplier is not None
        and abs(followed.multiplier / classical - 1) < TOLERANCE
    ):
        yield Finding(
            "note" if held else "problem",
            topic,
            f"The noise is that of the classical formula sqrt(2 ln(1.25 / delta)) / epsilon, which is proved for epsilon "
            f"below 1 only and was used at {claim.epsilon:g}. The exact calculation must be used.",
        )
    if not held and followed.once is not None and followed.once <= claim.epsilon * (1 + TOLERANCE):
        yield Finding(
            "problem",
            topic,
            f"The claim holds for one round ({_number(followed.once)}) and is used for {rounds}: every round costs anew.",
        )
    yield Finding(
        "note",
        topic,
        f"How far one update can move what leaves was tried out on {_number(measured.sensitivity.norm)} at most, not proved: "
        "read the clipping in the code as well.",
    )
    if not measured.sensitivity.paired:
        yield Finding(
            "note",
            topic,
            "The noise could not be seeded, so how far an update moves what leaves is known from averages only, and the "
            "epsilons are lower ends.",
        )


def _beside(found: Behavior, noise: Noise, claim: Claim) -> Iterator[Finding]:
    topic = "What else does it touch?"
    if noise.follows_counter:
        low, high = (noise.by_counter[number] for number in COUNTERS)
        yield Finding(
            "problem",
            topic,
            f"A whole number that counts batches steers the noise: its standard deviation is {low:.3g} after {COUNTERS[0]} "
            f"batches and {high:.3g} after {COUNTERS[1]:,}. The counter drowns the patients' numbers or leaves them bare.",
        )
    if noise.pattern:
        yield Finding(
            "problem",
            topic,
            "An empty update leaves as the same fixed pattern in every call; who sees two of them takes it off.",
        )
    if found.counters:
        yield Finding(
            "problem",
            topic,
            f"It changes whole numbers that count batches ({', '.join(found.counters)}), which breaks training and protects nobody.",
        )
    if not found.error and found.applied:
        if not found.bare_buffers and found.buffers:
            yield Finding(
                "good", topic, "Batch norm's statistics, which are averages over patients' images, are filtered too."
            )
        elif found.bare_buffers:
            level: Literal["problem", "note"] = "problem" if claim.epsilon is not None else "note"
            yield Finding(
                level,
                topic,
                "Batch norm's statistics, which are averages over patients' images, leave as they come"
                + ("; the claimed epsilon does not cover them." if claim.epsilon is not None else "."),
            )
        else:
            yield Finding(
                "good", topic, "Batch norm's statistics, which are averages over patients' images, are not sent."
            )
    if found.applied:
        yield from _formats(found)
    if found.recast:
        yield Finding("note", topic, f"The number format changes in {', '.join(found.recast)}.")


def _formats(found: Behavior) -> Iterator[Finding]:
    topic = "What else does it touch?"
    bare = [dtype for dtype, said in found.dtypes if said == "unchanged"]
    if any("float" in dtype for dtype in bare):
        yield Finding("problem", topic, f"Trained numbers in other formats pass as they come: {', '.join(bare)}.")
    elif bare:
        yield Finding(
            "note", topic, f"Trained whole numbers ({', '.join(bare)}, as in quantized models) pass as they come."
        )
    if raising := [dtype for dtype, said in found.dtypes if said.startswith("raises")]:
        yield Finding(
            "note", topic, f"It refuses numbers of format {', '.join(raising)} with an error, so nothing leaks by them."
        )


def _settings(trials: Sequence[Trial]) -> Iterator[Finding]:
    topic = "What do wrong settings do?"
    opened = [trial for trial in trials if trial.open]
    for trial in opened:
        what = "the update leaves as it came" if trial.outcome == "unchanged" else "no noise is added"
        yield Finding(
            "problem", topic, f"It fails open: with {trial.setting} = {trial.value:g} {what}, and nobody is told."
        )
    quiet = [trial for trial in trials if trial.outcome == "noiseless" and not trial.open]
    for trial in quiet:
        yield Finding("note", topic, f"With {trial.setting} = {trial.value:g} no noise is added, and nobody is told.")
    refused = sum(trial.outcome == "refused" for trial in trials)
    if trials and not opened:
        yield Finding(
            "good",
            topic,
            f"Of {len(trials)} wrong settings none lets the update pass; {refused} are refused with an error.",
        )


def _attacks(rows: Sequence[Leakage]) -> Iterator[Finding]:
    topic = "Which attacks still work?"
    for row in rows:
        if row.reason:
            yield Finding("note", topic, f"{row.attack}: {row.reason}.")
    behind = [row for row in rows if row.filtered and not row.reason]
    if not behind:
        return
    best = max(behind, key=lambda row: row.ssim or 0.0)
    score = f"SSIM {best.ssim:.2f} on average, {best.successes} of {best.victims} images at 0.9 or above"
    if best.works:
        level: Literal["problem", "note"] = "problem" if best.successes else "note"
        yield Finding(
            level,
            topic,
            f"Images come back through the filter: {best.attack} reaches {score}; somebody else's image reaches {best.null_ssim:.2f}.",
        )
    else:
        yield Finding(
            "good",
            topic,
            f"Of {len(behind)} attacks with a small budget none brings back more than somebody else's image shows ({best.null_ssim:.2f}); "
            f"the best, {best.attack}, reaches {score}.",
        )


def _number(value: float) -> str:
    """Two or three significant digits, large numbers written out.

    >>> _number(4.3772), _number(212802245.6), _number(float("inf"))
    ('4.38', '210,000,000', 'infinite')
    """
    if math.isinf(value):
        return "infinite"
    return f"{value:.3g}" if value < 1000 else f"{float(f'{value:.2g}'):,.0f}"

"""What a check of vetting is: a measure with a threshold, and what is meant where the measure lies above it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from medpfl.core.domain import Tensors
from medpfl.core.registry import Registry
from medpfl.guards.vetting.layers import Layers
from medpfl.guards.vetting.watch import Watched

About = Literal["structure", "reference", "behavior"]
Meaning = Literal["crafted", "leaks"]


@dataclass(frozen=True)
class Evidence:
    """What there is to look at: the tensors of a model, its layers, those of an earlier one, the model at work.

    misfit: why the tensors do not fit the agreed model, empty if they do; None where no model was agreed on.
    """

    tensors: Tensors
    layers: Layers
    reference: Tensors | None = None
    misfit: str | None = None
    watched: Watched | None = None


@dataclass(frozen=True)
class Measured:
    """The largest score that a check met, the layer or tensor that has it, and what is seen there, in half a sentence."""

    score: float
    where: str
    seen: str


@dataclass(frozen=True)
class Check:
    """One thing that vetting looks at.

    about: what it needs (tensors, a reference, or a model at work). means: what a score above the threshold says about
    the model. measure: the score, larger for worse; None where the model has nothing that the check applies to.
    """

    about: About
    means: Meaning
    threshold: float
    measure: Callable[[Evidence], Measured | None]


@dataclass(frozen=True)
class Result:
    """What one check found.

    status: `clear`, `found`, or `not checked` for want of what the check needs, or of a layer that it applies to.
    score: NaN where not checked. sentence: what was seen, or why nothing was looked at.
    """

    check: str
    about: About
    means: Meaning
    status: Literal["clear", "found", "not checked"]
    score: float
    threshold: float
    where: str
    sentence: str


CHECKS: Registry[Check] = Registry("check")
"""All checks by name. Thresholds were fixed on the zoo of this package and on the nets of `tests/guards`, none of
which may be counted when detection is measured (`docs/guards.md`)."""

Measure = Callable[[Evidence], Measured | None]


def check(
    name: str, *, about: About, means: Meaning, threshold: float, summary: str, paper: str = "", limits: str = ""
) -> Callable[[Measure], Measure]:
    """Registers a measure as a check; the function itself stays as it is."""

    def decorate(measure: Measure) -> Measure:
        CHECKS.add(name, Check(about, means, threshold, measure), summary=summary, paper=paper, limits=limits)
        return measure

    return decorate


def behavior(
    name: str, *, means: Meaning, threshold: float, summary: str, paper: str = "", limits: str = ""
) -> Callable[[Callable[[Watched], Measured | None]], Callable[[Watched], Measured | None]]:
    """Registers a measure of a model at work as a check; the function itself stays as it is."""

    def decorate(measure: Callable[[Watched], Measured | None]) -> Callable[[Watched], Measured | None]:
        def at_work(evidence: Evidence) -> Measured | None:
            return None if evidence.watched is None else measure(evidence.watched)

        found = Check("behavior", means, threshold, at_work)
        CHECKS.add(name, found, summary=summary, paper=paper, limits=limits)
        return measure

    return decorate


def worst(found: list[Measured]) -> Measured | None:
    """The one with the largest score; None of none."""
    return max(found, key=lambda measured: measured.score, default=None)

"""The one-page audit of a filter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from medpfl.audit.filters.behavior import behavior, suited
from medpfl.audit.filters.claims import Claim, following
from medpfl.audit.filters.findings import Finding, Measurements, findings
from medpfl.audit.filters.leakage import leakage
from medpfl.audit.filters.noise import measure_noise
from medpfl.audit.filters.parameters import try_parameters
from medpfl.audit.filters.recognition import recognize
from medpfl.audit.filters.sensitivity import Sensitivity, measure_sensitivity
from medpfl.audit.filters.subject import Subject


@dataclass(frozen=True)
class FilterAudit:
    """What a filter is, claims and does. arrays: what it is called with. recognized: its mechanism in words. passed: no finding is a problem."""

    name: str
    settings: Mapping[str, Any]
    arrays: str
    claim: Claim
    recognized: tuple[str, ...]
    measured: Measurements
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether no finding is a problem."""
        return not any(finding.level == "problem" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """One sentence for the head of the page."""
        problems = [finding for finding in self.findings if finding.level == "problem"]
        if problems:
            more = (
                f" {len(problems) - 1} more problem{'s' if len(problems) > 2 else ''} below."
                if len(problems) > 1
                else ""
            )
            return f"Do not rely on this filter as it is. {problems[0].sentence}{more}"
        if self.measured.following.reasons:
            return (
                "The filter does what a filter must, and gives no formal guarantee: it holds back what was tried here and "
                "nothing is promised of other attacks."
            )
        return (
            "The filter does what it must, and what it claims follows from what it does."
            if self.claim.epsilon
            else ("The filter does what it must, and a guarantee follows from what it does.")
        )


def audit_filter(subject: Subject, claim: Claim = Claim(), *, victims: int = 2) -> FilterAudit:
    """Measures a filter and says what that means. victims: images that are attacked behind it; 0 attacks none.

    Raises MissingExtra where an epsilon needs dp-accounting. What the filter itself raises becomes a finding.
    """
    subject = suited(subject)
    found = behavior(subject)
    noise = measure_noise(subject)
    sensitivity = Sensitivity(error=noise.error) if noise.error else measure_sensitivity(subject, noise)
    recognized = recognize(subject, found, noise, sensitivity)
    measured = Measurements(
        behavior=found,
        noise=noise,
        sensitivity=sensitivity,
        following=following(claim, noise, sensitivity),
        trials=try_parameters(subject, noise.present),
        leakage=leakage(subject, recognized.mechanism, victims) if victims and not found.error else (),
    )
    return FilterAudit(
        subject.name,
        dict(subject.settings),
        subject.arrays,
        claim,
        recognized.words,
        measured,
        findings(measured, claim),
    )


def as_plain(audit: FilterAudit) -> dict[str, Any]:
    """The audit as JSON-like values; what is not finite becomes text."""
    found: dict[str, Any] = _plain(asdict(audit))
    return {"filter": found.pop("name"), "verdict": audit.verdict, "passed": audit.passed, **found}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value

"""What went wrong or could not run, grouped by reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medpfl.report.views import Cell

SHOWN_CASES = 5
"""Case ids that are written out per group."""


@dataclass(frozen=True)
class FailureGroup:
    """Cases of one attack and status that share a reason."""

    status: str
    attack: str
    reason: str
    cells: tuple[str, ...]
    cases: tuple[str, ...]


@dataclass(frozen=True)
class RefusalGroup:
    """Cells that were refused for one reason."""

    reason: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class SilentGroup:
    """Finished cases of one attack that got no image from the update, for one reason."""

    attack: str
    reason: str
    cells: tuple[str, ...]
    cases: tuple[str, ...]


def silent_groups(cells: Sequence[Cell]) -> tuple[SilentGroup, ...]:
    """Finished cases for whose images nothing at all came back, the most frequent reason first."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for cell in cells:
        answered = {result.case for result in cell.results if not result.fallback}
        for result in cell.results:
            if result.fallback and result.case not in answered:
                reason = result.stop_reason.removeprefix("nothing came back: ") or "no reason was stored"
                groups.setdefault((cell.attack, reason), {})[result.case] = cell.id
    found = [
        SilentGroup(*key, cells=tuple(dict.fromkeys(cases.values())), cases=tuple(cases))
        for key, cases in groups.items()
    ]
    return tuple(sorted(found, key=lambda group: -len(group.cases)))


def failure_groups(cells: Sequence[Cell]) -> tuple[FailureGroup, ...]:
    """Failed and blocked cases, the most frequent reason first."""
    groups: dict[tuple[str, str, str], dict[str, str]] = {}
    for cell in cells:
        for result in cell.results:
            if result.status in ("failed", "blocked"):
                key = (result.status, cell.attack, result.reason or "no reason was stored")
                groups.setdefault(key, {})[result.case] = cell.id
    found = [
        FailureGroup(*key, cells=tuple(dict.fromkeys(cases.values())), cases=tuple(cases))
        for key, cases in groups.items()
    ]
    return tuple(sorted(found, key=lambda group: -len(group.cases)))


def refusal_groups(cells: Sequence[Cell]) -> tuple[RefusalGroup, ...]:
    """Refused cells, the most frequent reason first."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.refused:
            groups.setdefault(cell.reason or "no reason was stored", []).append(cell)
    return tuple(
        RefusalGroup(reason, tuple(found)) for reason, found in sorted(groups.items(), key=lambda item: -len(item[1]))
    )


def defense_warnings(warnings: Sequence[str], cells: Sequence[Cell]) -> dict[str, list[str]]:
    """Warnings that start with the id of a defense and a colon, by that id: they belong beside its results.

    >>> defense_warnings(["laplace: no clipping", "slow"], [Cell("c", {"defense": "laplace"})])
    {'laplace': ['no clipping']}
    """
    found: dict[str, list[str]] = {}
    for defense in dict.fromkeys(cell.defense for cell in cells):
        texts = [text.removeprefix(f"{defense}:").strip() for text in warnings if text.startswith(f"{defense}:")]
        if defense and texts:
            found[defense] = texts
    return found

"""What guards found and stopped, beside what the same attack recovered without them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medpfl.report.formatting import count, percent
from medpfl.report.views import AXES, NOTHING_THERE, Cell, ImageResult

LEVEL_WORDS = {
    "crafted": "the model is crafted",
    "leaks": "images come back",
    "unusable": "nothing that may be sent",
    "passed": "nothing found",
}
"""What a guard's verdict means, from worst to harmless."""

SHOWN_REASONS = 3
"""How many reasons of a verdict are written out; all are in `results.csv`."""

Client = tuple[str, str, str]
"""Seed, victim and number of a client."""


@dataclass(frozen=True)
class GuardOutcome:
    """A cell with a guard, and the same without it if that was audited.

    levels: verdict -> scored clients. clients: scored clients, withheld: how many of them sent nothing. others: other
    clients in the aggregate, as often as they took part; others_withheld: how often one of them sent nothing. reason:
    the most frequent sentence of those that withheld, else of all.
    """

    cell: Cell
    unguarded: Cell | None
    levels: Mapping[str, int]
    clients: int
    withheld: int
    others: int
    others_withheld: int
    reason: str

    @property
    def verdicts(self) -> str:
        """How many clients got which verdict, the worst first."""
        return ", ".join(f"{self.levels[level]} {level}" for level in LEVEL_WORDS if self.levels.get(level))


def guard_outcomes(cells: Sequence[Cell]) -> tuple[GuardOutcome, ...]:
    """One outcome per cell with a guard whose cases ran, in the order of the cells."""
    return tuple(_outcome(cell, _unguarded(cell, cells)) for cell in cells if guarded(cell) and verdicts(cell))


def guarded(cell: Cell) -> bool:
    """Whether the cell's clients have a guard."""
    return cell.axes.get("guard", "") not in NOTHING_THERE


def verdicts(cell: Cell) -> dict[Client, ImageResult]:
    """A row of every scored client whose guard said something."""
    return {(row.seed, row.victim, row.client): row for row in cell.results if row.verdict}


def beside_pictures(cells: Sequence[Cell]) -> dict[str, dict[Client, list[str]]]:
    """Cell id -> client -> what its own guard found, or what guards of the same setting would have done."""
    found: dict[str, dict[Client, list[str]]] = {}
    for cell in cells:
        for client, row in verdicts(cell).items():
            if row.status != "blocked":
                found.setdefault(cell.id, {}).setdefault(client, []).append(f"Guard {shortened(row.verdict_reason)}")
            twin = _unguarded(cell, cells)
            if twin is not None:
                what = "would have withheld this update" if row.status == "blocked" else "would have let it pass"
                guard = cell.axes.get("guard", "")
                text = f"The guard {guard} {what}. {shortened(row.verdict_reason)}"
                found.setdefault(twin.id, {}).setdefault(client, []).append(text)
    return found


def recovered(cell: Cell | None) -> str:
    """What came back in a cell, in a few words.

    >>> recovered(None)
    'not audited'
    """
    if cell is None:
        return "not audited"
    if not cell.done:
        return "nothing, all withheld" if cell.blocked else "nothing finished"
    rate = f"{percent(cell.asr.value)} reconstructed"
    return rate if cell.recovered.value is None else f"{rate}, {percent(cell.recovered.value)} above 30 dB"


def shortened(text: str) -> str:
    """A verdict with its weightiest reasons only.

    >>> shortened("vetting: crafted (one; two; three; four; five)")
    'vetting: crafted (one; two; three; and 2 more)'
    """
    head, bracket, inside = text.partition(" (")
    reasons = inside.removesuffix(")").split("; ")
    if len(reasons) <= SHOWN_REASONS:
        return text
    return f"{head}{bracket}{'; '.join(reasons[:SHOWN_REASONS])}; and {len(reasons) - SHOWN_REASONS} more)"


def others(outcome: GuardOutcome) -> str:
    """How many of the other clients withheld theirs."""
    return f"{outcome.others_withheld} of {count(outcome.others, 'update')}" if outcome.others else ""


def _outcome(cell: Cell, unguarded: Cell | None) -> GuardOutcome:
    found = verdicts(cell)
    blocked = [row for row in found.values() if row.status == "blocked"]
    reasons = Counter(row.verdict_reason for row in blocked or found.values())
    cases = {(row.seed, row.victim): row for row in found.values()}
    scored = len(found) // len(cases)
    beside = int(float(cell.params.get("channel", {}).get("clients", 1))) - scored
    own = Counter((row.seed, row.victim) for row in blocked)
    missing = sum(int(row.others_withheld or 0) + (row.status == "blocked") - own[case] for case, row in cases.items())
    return GuardOutcome(
        cell=cell,
        unguarded=unguarded,
        levels=Counter(row.verdict for row in found.values()),
        clients=len(found),
        withheld=len(blocked),
        others=beside * len(cases),
        others_withheld=missing,
        reason=shortened(reasons.most_common(1)[0][0]),
    )


def _unguarded(cell: Cell, cells: Sequence[Cell]) -> Cell | None:
    """The cell that differs in nothing but that it has no guard."""

    def rest(one: Cell) -> tuple[str, ...]:
        return tuple(one.axes.get(axis, "") for axis in AXES if axis != "guard")

    return next((other for other in cells if not guarded(other) and rest(other) == rest(cell)), None)

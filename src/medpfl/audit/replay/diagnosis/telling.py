"""All that a diagnosis says of each update, as entries of `summary.json` and rows of `diagnosis.csv`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medpfl.audit.replay.cells import ReplayCell
from medpfl.audit.replay.diagnosis.changes import Owned
from medpfl.audit.replay.diagnosis.facts import measured
from medpfl.audit.replay.diagnosis.owners import owned as owned_facts
from medpfl.audit.replay.diagnosis.search import case_facts
from medpfl.audit.replay.diagnosis.subject import Fact, Subject
from medpfl.audit.replay.diagnosis.subjects import Known
from medpfl.audit.replay.diagnosis.why import why
from medpfl.audit.replay.settings import Replay
from medpfl.federation.recording import Recorded

FACT_COLUMNS = ("recording", "round", "client", "attack", "fact", "standing", "value", "text", "schema")
"""Columns of `diagnosis.csv`: one row per sentence."""

Row = Mapping[str, Any]


def told(
    cells: Mapping[str, ReplayCell],
    changes: Sequence[Mapping[str, str]],
    refusals: Mapping[str, str],
    rows: Sequence[Row],
    folder: Path,
    known: Known,
) -> list[dict[str, Any]]:
    """An entry for every update, in order, with its facts.

    cells: those of the replay, by id. changes: as stored. refusals: by id of the cell. rows: those of `results.csv`.
    """
    cases: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        cases.setdefault((str(row["cell"]), int(row["victim"])), []).append(row)
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    for base, cell in cells.items():
        for victim, update in enumerate(cell.updates):
            key = (cell.settings.name, update.round, update.client)
            if key not in found:
                found[key] = {"recording": key[0], "round": key[1], "client": key[2], "facts": []}
                found[key]["facts"] += [asdict(fact) for fact in _of_update(cell.settings, update, known)]
            changed = {
                change["change"]: cases.get((change["changed"], victim), ())
                for change in changes
                if change["cell"] == base
            }
            facts = _of_case(cell, update, cases.get((base, victim), ()), changed, refusals.get(base), folder, known)
            found[key]["facts"] += [asdict(fact) for fact in facts]
    return list(found.values())


def _of_update(settings: Replay, update: Recorded, known: Known) -> list[Fact]:
    subject = known.subject(settings, update)
    if isinstance(subject, str):
        return [Fact("unread", f"The update could not be read: {subject}.", None, "hinders")]
    facts = measured(subject)
    if settings.truths is None:
        return facts
    owned = known.owned(settings, update)
    if isinstance(owned, str):
        return [*facts, Fact("agreement", f"The client's step was not replayed: {owned}.")]
    return [*facts, *owned_facts(subject, owned.groups, owned.agreement)]


def _of_case(
    cell: ReplayCell,
    update: Recorded,
    rows: Sequence[Row],
    changed: Mapping[str, Sequence[Row]],
    refusal: str | None,
    folder: Path,
    known: Known,
) -> Iterator[Fact]:
    """What became of one attack on one update."""
    if refusal is not None:
        yield Fact("search", f"Not run: {refusal}.", None, "hinders", cell.entry.id)
        return
    subject = known.subject(cell.settings, update)
    if not rows or not isinstance(subject, Subject):
        return
    owned = known.owned(cell.settings, update)
    yield from case_facts(subject, rows, folder, owned if isinstance(owned, Owned) else None)
    if isinstance(owned, Owned) and rows[0]["status"] == "done":
        yield why(cell.entry.id, rows, changed)


def table_rows(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `diagnosis.csv`."""
    return [
        {**{name: entry[name] for name in ("recording", "round", "client")}, "fact": fact["name"], **fact}
        for entry in entries
        for fact in entry["facts"]
    ]

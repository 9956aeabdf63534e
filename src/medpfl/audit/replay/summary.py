"""The tables and the summary of a replay, as an audit's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from medpfl.audit.diagnosis import is_extra
from medpfl.audit.effects import diagnosis
from medpfl.audit.replay.diagnosis.telling import FACT_COLUMNS, table_rows
from medpfl.audit.replay.settings import Replay
from medpfl.audit.store import SCHEMA, Store, StoredCell
from medpfl.audit.tables import CELL_COLUMNS, RESULT_COLUMNS, csv_bytes, hardware, marks, versions
from medpfl.core.files import write_atomically
from medpfl.metrics.cells import summarize_cell, supplement_cell
from medpfl.metrics.recovery import recovery_rates
from medpfl.models import validate

NO_TRUTH = (
    "No ground truth was given: pictures and objectives are shown, and no score is claimed. A small objective means that "
    "the picture explains the update, not that it is the patient's."
)

MOST_NAMED = 8
"""Rounds that are named one by one."""


def write_tables(store: Store, parts: Sequence[Replay]) -> list[dict[str, Any]]:
    """Writes `results.csv`, `cells.csv`, `summary.json` and, of a diagnosis, `diagnosis.csv`; returns the cells' rows.

    Cells that exist for a diagnosis only stand in both tables, marked as an audit's are, and are not returned.
    """
    changes: list[dict[str, str]] = store.get("changes") or []
    updates: list[dict[str, Any]] = store.get("updates") or []
    marked = marks(changes)
    rows = [{**row, **marked.get(row["cell"], {})} for row in store.results()]
    frame = pd.DataFrame(rows, columns=list(RESULT_COLUMNS))
    write_atomically(store.folder / "results.csv", csv_bytes(rows, RESULT_COLUMNS))
    by_cell = dict(tuple(frame.groupby("cell", sort=False)))
    cells = [
        {**_cell_row(cell, by_cell.get(cell.cell, frame[:0]), parts[0].threshold), **marked.get(cell.cell, {})}
        for cell in store.cells()
    ]
    write_atomically(store.folder / "cells.csv", csv_bytes(cells, CELL_COLUMNS))
    if updates:
        write_atomically(store.folder / "diagnosis.csv", csv_bytes(table_rows(updates), FACT_COLUMNS))
    own = [cell for cell in cells if not is_extra(cell["cell"])]
    summary = {
        **_summary(store, parts, own),
        "diagnosis": diagnosis(changes, {cell["cell"]: cell for cell in cells if _told(cell)}, frame)
        if updates
        else [],
        "updates": updates,
    }
    write_atomically(store.folder / "summary.json", json.dumps(summary, indent=2).encode())
    return own


def _told(cell: Mapping[str, Any]) -> bool:
    """Whether a diagnosis says something of the cell: whoever has no truth has nothing to compare."""
    return cell.get("asr") is not None or is_extra(str(cell["cell"]))


def _cell_row(cell: StoredCell, rows: pd.DataFrame, threshold: float) -> dict[str, Any]:
    row: dict[str, Any] = {"cell": cell.cell, **cell.columns}
    if cell.refusal is not None:
        return {**row, "status": "refused", "reason": cell.refusal}
    scored = rows[rows["success"].notna()]  # of the others nobody gave the truth
    if scored.empty:
        return {**row, **_counts(rows)}
    rows = scored
    return {
        **row,
        **summarize_cell(rows, threshold=threshold, seed=0),
        **supplement_cell(rows, threshold=threshold),
        **recovery_rates(rows, seed=0),
        "status": "done",
    }


def _counts(rows: pd.DataFrame) -> dict[str, Any]:
    """What can be said of a cell without ground truth."""
    done = int((rows["status"] == "done").sum())
    return {
        "victims": int(rows["victim"].nunique()),
        "images": len(rows),
        "done": done,
        "failed": len(rows) - done,
        "blocked": 0,
        "complete": len(rows) > 0 and done == len(rows),
        "status": "done",
    }


def _summary(store: Store, parts: Sequence[Replay], cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts, several = store.counts(lambda cell: not is_extra(cell)), len(parts) > 1
    findings = {
        (one.code, one.message): {"model": part.model.name, "severity": one.severity, "code": one.code, "message": one.message}
        for part in parts
        for one in validate(part.model, part.known_recipe, try_derivatives=False)
    }  # fmt: skip
    return {
        "schema": SCHEMA,
        "name": f"Replay of {', '.join(part.name for part in parts)}",
        "replay": True,
        "scored": any(part.truths is not None for part in parts),
        "created": store.get("created"),
        "finished": True,
        "threshold": parts[0].threshold,
        "limit": None,
        "counts": {"cells": len(cells), "refused": sum(cell["status"] == "refused" for cell in cells), **counts},
        "seconds": sum(row["seconds"] or 0.0 for row in store.results() if row["position"] == 0),
        "data": [_data(part) for part in parts],
        "assumptions": [{"title": title, "text": text} for title, text in _assumptions(parts)],
        "findings": list(findings.values()),
        "warnings": [
            {"text": f"{part.name}: {text}" if several else text}
            for part in parts
            for text in (
                *part.recording.problems,
                *([part.recording.about.notes] if part.recording.about.notes else []),
            )
        ],
        "versions": versions(),
        "hardware": hardware(),
        "plan": {},
    }


def _data(part: Replay) -> dict[str, Any]:
    """One recording in a line: who sent what through which channel."""
    about, rounds = part.recording.about, sorted({update.round for update in part.updates})
    several = f"{rounds[0]} to {rounds[-1]}, {len(rounds)} of them"
    return {
        "dataset": part.name,
        "source": about.source,
        "channel": about.channel or "plain",
        "defense": about.defense or "none",
        "rounds": several if len(rounds) > MOST_NAMED else rounds,
        "clients": len({update.client for update in part.updates}),
        "updates": len(part.updates),
        "truth": "given" if part.truths is not None else "not given",
        **({} if part.nulls is None else {"null": len(part.nulls.images)}),
        **({} if part.auxiliary is None else {"auxiliary": len(part.auxiliary.images)}),
    }


def _assumptions(parts: Sequence[Replay]) -> list[tuple[str, str]]:
    sources = ", ".join(dict.fromkeys(part.recording.about.source for part in parts if part.recording.about.source))
    updates = sum(len(part.updates) for part in parts)
    found = [
        ("A recording, not a simulation", f"The updates are those that clients sent"
         f"{f' ({sources})' if sources else ''}; {updates} of them were attacked."),
        ("Who sees this", "Whoever runs the server, without changing anything: the model of each round, the clients' "
         "updates, and how many images they say they trained on."),
    ]  # fmt: skip
    if behind := [part.name for part in parts if part.recording.about.channel not in ("", "plain")]:
        found.append(
            ("Behind secure aggregation", f"{_of(behind, parts)}the server sees one update per round, the mean over all "
             "clients, and the images of all of them are the victims. It is attacked as if one client held them all.")
        )  # fmt: skip
    if informed := [part.name for part in parts if part.defense is not None]:
        found.append(
            ("Who knows the defense", f"{_of(informed, parts)}attackers that can use it are told what clients do to their "
             "updates, as a published or guessed setting would tell them; the others attack as if nothing were done.")
        )  # fmt: skip
    if withheld := [part.name for part in parts if part.recipe is None]:
        found.append(
            ("The recipe is not known", f"{_of(withheld, parts)}How clients train was not given; attacks that need it were "
             "refused or take the update for one gradient. A server usually knows it: give --recipe.")
        )  # fmt: skip
    if unknown := [part.name for part in parts if part.truths is None]:
        found.append(("No ground truth", f"{_of(unknown, parts)}{NO_TRUTH}"))
    return found


def _of(names: Sequence[str], parts: Sequence[Replay]) -> str:
    """Which recordings a sentence is about; nothing where it is about all."""
    return "" if len(names) == len(parts) else f"{', '.join(names)}: "

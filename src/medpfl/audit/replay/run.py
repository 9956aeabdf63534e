"""Runs a replay, or what is left of it, and writes the same tables as an audit."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medpfl.audit.entries import AXES, AttackEntry
from medpfl.audit.plan import Chunk, case_id
from medpfl.audit.replay.observing import observe, observed_kind
from medpfl.audit.replay.rows import Place, replayed_rows
from medpfl.audit.replay.settings import Replay
from medpfl.audit.rows import Row
from medpfl.audit.runner import Listener, NoListener
from medpfl.audit.store import SCHEMA, Store, StoredCell
from medpfl.audit.tables import CELL_COLUMNS, RESULT_COLUMNS, csv_bytes, hardware, now, versions
from medpfl.core.domain import Failure, Observation
from medpfl.core.errors import DataError, ModelError, StoreError
from medpfl.core.files import write_atomically
from medpfl.core.functional import is_finite
from medpfl.core.seeding import generator
from medpfl.core.session import NO_SESSION
from medpfl.federation.recording import Recorded
from medpfl.metrics.cells import summarize_cell, supplement_cell
from medpfl.metrics.recovery import recovery_rates
from medpfl.models import validate

NO_TRUTH = (
    "No ground truth was given: pictures and objectives are shown, and no score is claimed. A small objective means that "
    "the picture explains the update, not that it is the patient's."
)


@dataclass(frozen=True)
class ReplaySummary:
    """What became of a replay: its folder, counts of cases, rows of `cells.csv`, and how many were computed now."""

    folder: Path
    counts: Mapping[str, int]
    cells: tuple[dict[str, Any], ...]
    computed: int


def replay(settings: Replay, out: Path, listener: Listener | None = None) -> ReplaySummary:
    """Attacks every chosen update with every attack and writes tables and summary into `out`.

    A cell is one attack on one round, its victims are the round's clients in the order of their names. Run again it
    does what is left. Raises StoreError where `out` holds something else.
    """
    with Store(out).open() as store:
        _check_same(store, settings)
        rounds = _rounds(settings)
        cells = {_cell_id(settings, number, entry): (number, entry) for number in rounds for entry in settings.attacks}
        known = {cell.cell for cell in store.cells()}
        new = [_stored(settings, rounds[number], cell, number, entry) for cell, (number, entry) in cells.items()
               if cell not in known]  # fmt: skip
        chunks = [
            Chunk(cell.cell, settings.seed, (victim,))
            for cell in new
            if cell.refusal is None
            for victim in range(len(rounds[cells[cell.cell][0]]))
        ]
        store.add_cells(new, chunks, list(cells))
        pending = store.pending()
        listener = listener or NoListener()
        for chunk in pending:
            _tell(store, listener)
            number, entry = cells[chunk.cell]
            store.finish(chunk, _case(settings, rounds[number], chunk, number, entry, out))
        _tell(store, listener)
        rows = _write(store, settings)
        return ReplaySummary(out, store.counts(), tuple(rows), len(pending))


def _tell(store: Store, listener: Listener) -> None:
    counts = store.counts()
    listener.update(counts["done"] + counts["failed"], counts["cases"], counts["failed"])


def _check_same(store: Store, settings: Replay) -> None:
    found = store.get("replay")
    if found is None and store.cells():
        raise StoreError(f"{store.folder}: holds an audit, no replay; choose another --out")
    if found is None:
        store.set("replay", settings.fingerprint)
        store.set("created", now())
    elif found != settings.fingerprint:
        raise StoreError(
            f"{store.folder}: holds a replay of other updates, attacks or settings; choose another --out, or give the same"
        )


def _rounds(settings: Replay) -> dict[int, list[Recorded]]:
    rounds: dict[int, list[Recorded]] = {}
    for update in settings.updates:
        rounds.setdefault(update.round, []).append(update)
    return rounds


def _columns(settings: Replay, number: int, entry: AttackEntry) -> dict[str, Any]:
    about = settings.recording.about
    recipe = settings.recipe
    values: dict[str, tuple[str, Mapping[str, Any]]] = {
        "dataset": (settings.name, {"name": settings.name, "recording": True}),
        "model": (f"{_short(settings.model.name)}-round-{number:03d}", {"name": settings.model.name, "round": number}),
        "recipe": ("withheld", {}) if recipe is None else (recipe.id, {"name": recipe.name, **recipe.params}),
        "threat_model": ("honest_server", {"name": "honest_server", "knows": ["auxiliary"] if settings.auxiliary else []}),
        "channel": (about.channel or "plain", {"name": about.channel or "plain"}),
        "defense": ("as-recorded", {"name": about.defense}) if about.defense else ("none", {"name": "none"}),
        "guard": ("none", {"name": "none"}),
        "attack": (entry.id, {"name": entry.name, **entry.params}),
    }  # fmt: skip
    found: dict[str, Any] = {axis: values[axis][0] for axis in AXES}
    return found | {f"{axis}_params": json.dumps(dict(values[axis][1])) for axis in AXES}


def _short(name: str) -> str:
    return name.rpartition(":")[2].rpartition(".")[2]


def _cell_id(settings: Replay, number: int, entry: AttackEntry) -> str:
    columns = _columns(settings, number, entry)
    return "/".join(str(columns[axis]) for axis in AXES)


def _stored(settings: Replay, updates: Sequence[Recorded], cell: str, number: int, entry: AttackEntry) -> StoredCell:
    columns = {**_columns(settings, number, entry), "oracle": "", "adaptive": False}
    return StoredCell(cell, settings.fingerprint, columns, _refusal(settings, updates, entry))


def _refusal(settings: Replay, updates: Sequence[Recorded], entry: AttackEntry) -> str | None:
    attack = entry.attack
    granted = {"auxiliary"} if settings.auxiliary is not None else set()
    if attack.needs():
        return f"{entry.name} is an attack of a malicious server, which this recording is not of"
    if missing := attack.requires() - granted:
        return f"{entry.name} needs knowledge that a replay does not have: {', '.join(sorted(missing))}"
    count = next((one.examples for one in updates if one.examples), settings.examples)
    if count is None:
        return None
    return attack.why_not(settings.model, settings.known_recipe, observed_kind(updates[0]), count)


def _case(
    settings: Replay, updates: Sequence[Recorded], chunk: Chunk, number: int, entry: AttackEntry, out: Path
) -> list[Row]:
    (victim,) = chunk.victims
    update, started = updates[victim], time.perf_counter()
    columns = _columns(settings, number, entry)
    place = Place({"cell": chunk.cell, **{axis: columns[axis] for axis in AXES}}, victim, update)
    reads = entry.attack.requires() | entry.attack.uses()
    stream = generator("attack", settings.seed, case_id(chunk.cell, settings.seed, victim))
    try:
        observation = observe(
            settings.recording,
            update,
            settings.model,
            settings.known_recipe,
            examples=settings.examples,
            auxiliary=settings.auxiliary if "auxiliary" in reads else None,
        )
    except (DataError, ModelError) as error:
        outcome: Any = Failure(str(error))
    else:
        outcome = _attacked(entry, observation, stream)
    seconds = time.perf_counter() - started
    return replayed_rows(settings, place, outcome, seconds, out, entry.attack.legacy_convention)


def _attacked(entry: AttackEntry, observation: Observation, stream: Any) -> Any:
    if not all(is_finite(tensor) for tensor in observation.update.trainable.values()):
        return Failure("the update is not finite: the client's own training diverged, nothing was attacked")
    (outcome,) = entry.attack.reconstruct([observation], [stream], NO_SESSION)
    return outcome


def _write(store: Store, settings: Replay) -> list[dict[str, Any]]:
    rows = store.results()
    frame = pd.DataFrame(rows, columns=list(RESULT_COLUMNS))
    write_atomically(store.folder / "results.csv", csv_bytes(rows, RESULT_COLUMNS))
    cells = [_cell_row(cell, frame[frame["cell"] == cell.cell], settings) for cell in store.cells()]
    write_atomically(store.folder / "cells.csv", csv_bytes(cells, CELL_COLUMNS))
    write_atomically(store.folder / "summary.json", json.dumps(_summary(store, settings, cells), indent=2).encode())
    return cells


def _cell_row(cell: StoredCell, rows: pd.DataFrame, settings: Replay) -> dict[str, Any]:
    row: dict[str, Any] = {"cell": cell.cell, **cell.columns}
    if cell.refusal is not None:
        return {**row, "status": "refused", "reason": cell.refusal}
    scored = settings.truths is not None and bool(rows["ssim"].notna().any())
    if not scored:
        return {**row, **_counts(rows)}
    return {
        **row,
        **summarize_cell(rows, threshold=settings.threshold, seed=0),
        **supplement_cell(rows, threshold=settings.threshold),
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


def _summary(store: Store, settings: Replay, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts, about = store.counts(), settings.recording.about
    return {
        "schema": SCHEMA,
        "name": f"Replay of {settings.name}",
        "replay": True,
        "scored": settings.truths is not None,
        "created": store.get("created"),
        "finished": True,
        "threshold": settings.threshold,
        "limit": None,
        "counts": {"cells": len(cells), "refused": sum(cell["status"] == "refused" for cell in cells), **counts},
        "seconds": sum(row["seconds"] or 0.0 for row in store.results() if row["position"] == 0),
        "data": [],
        "assumptions": [{"title": title, "text": text} for title, text in _assumptions(settings)],
        "findings": [
            {"model": settings.model.name, "severity": one.severity, "code": one.code, "message": one.message}
            for one in validate(settings.model, settings.known_recipe, try_derivatives=False)
        ],
        "warnings": [
            {"text": text} for text in (*settings.recording.problems, *([about.notes] if about.notes else []))
        ],
        "versions": versions(),
        "hardware": hardware(),
        "plan": {},
    }


def _assumptions(settings: Replay) -> list[tuple[str, str]]:
    about = settings.recording.about
    found = [
        ("A recording, not a simulation", f"The updates are those that clients sent"
         f"{f' ({about.source})' if about.source else ''}; {len(settings.updates)} of them were attacked."),
        ("Who sees this", "Whoever runs the server, without changing anything: the model of each round, the clients' "
         "updates, and how many images they say they trained on."),
    ]  # fmt: skip
    if settings.recipe is None:
        found.append(
            ("The recipe is not known", "How clients train was not given; attacks that need it were refused or take the "
             "update for one gradient. A server usually knows it: give --recipe.")
        )  # fmt: skip
    if settings.truths is None:
        found.append(("No ground truth", NO_TRUTH))
    return found

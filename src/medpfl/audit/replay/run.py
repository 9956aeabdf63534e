"""Runs a replay, or what is left of it, and writes the same tables as an audit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medpfl.audit.diagnosis import is_extra
from medpfl.audit.entries import AXES
from medpfl.audit.plan import CHUNK_VICTIMS, Chunk, case_id
from medpfl.audit.replay.cells import ReplayCell
from medpfl.audit.replay.columns import cell_columns, cell_id, refusal
from medpfl.audit.replay.diagnosis.subjects import Known
from medpfl.audit.replay.diagnosis.sweep import as_stored, sweep
from medpfl.audit.replay.diagnosis.telling import told
from medpfl.audit.replay.rows import Place, replayed_rows
from medpfl.audit.replay.settings import Replay
from medpfl.audit.replay.summary import write_tables
from medpfl.audit.rows import Row
from medpfl.audit.runner import Listener, NoListener
from medpfl.audit.store import Store, StoredCell
from medpfl.audit.tables import now
from medpfl.core.domain import Failure, Observation
from medpfl.core.errors import InputError, StoreError
from medpfl.core.functional import is_finite
from medpfl.core.seeding import content_hash, generator
from medpfl.core.session import NO_SESSION
from medpfl.federation.recording import Recorded
from medpfl.metrics.truth import GroundTruth


@dataclass(frozen=True)
class ReplaySummary:
    """What became of a replay: its folder, counts of cases, rows of `cells.csv`, and how many were computed now."""

    folder: Path
    counts: Mapping[str, int]
    cells: tuple[dict[str, Any], ...]
    computed: int


def replay(
    parts: Sequence[Replay], out: Path, listener: Listener | None = None, *, diagnose: bool = False
) -> ReplaySummary:
    """Attacks every chosen update of every recording with every attack and writes tables and summary into `out`.

    Each recording is a data set of its own in the tables. Run again it does what is left. diagnose: whether the
    tables also say why each attack failed or worked on each update; a finished replay can be diagnosed later, and stays
    so. Raises StoreError where `out` holds something else.
    """
    with Store(out).open() as store:
        _check_same(store, content_hash([one.fingerprint for one in parts]))
        cells = {cell_id(cell.columns): cell for one in parts for cell in _cells(one)}
        _add(store, cells)
        diagnose, known = diagnose or store.get("changes") is not None, Known()
        computed = _compute(store, cells, known, listener or NoListener())
        if diagnose:
            computed += _diagnose(store, cells, known, listener or NoListener())
        rows = write_tables(store, parts)
        return ReplaySummary(out, store.counts(lambda cell: not is_extra(cell)), tuple(rows), computed)


def _add(store: Store, cells: Mapping[str, ReplayCell]) -> None:
    """Plans the cells that the store does not have yet."""
    stored = [cell.cell for cell in store.cells()]
    new = [
        StoredCell(name, cell.settings.fingerprint, dict(cell.columns), refusal(cell.settings, cell.updates, cell.entry))
        for name, cell in cells.items()
        if name not in stored
    ]  # fmt: skip
    chunks = [
        Chunk(one.cell, cells[one.cell].settings.seed, victims)
        for one in new
        if one.refusal is None
        for victims in _together(cells[one.cell])
    ]
    store.add_cells(new, chunks, [*cells, *(name for name in stored if is_extra(name))])


def _compute(store: Store, cells: Mapping[str, ReplayCell], known: Known, listener: Listener) -> int:
    """Computes what is pending of these cells; returns the number of cases."""
    pending = [chunk for chunk in store.pending() if chunk.cell in cells]
    for chunk in pending:
        _tell(store, listener)
        store.finish(chunk, _rows(cells[chunk.cell], chunk, known, store.folder))
    _tell(store, listener)
    return sum(len(chunk.victims) for chunk in pending)


def _diagnose(store: Store, cells: Mapping[str, ReplayCell], known: Known, listener: Listener) -> int:
    """Computes the changed cells, and what they and the updates tell; returns the number of cases."""
    if store.get("updates") is not None:
        return 0
    left = {cell.cell for cell in store.cells() if cell.refusal is None} - _open(store.results())
    changed = list(sweep({name: cell for name, cell in cells.items() if name in left}, known))
    stored = {cell.cell for cell in store.cells()}
    new = [one for one in changed if one.id not in stored]
    store.add_cells(
        [StoredCell(one.id, one.cell.settings.fingerprint, dict(one.cell.columns), one.refusal) for one in new],
        [
            Chunk(one.id, one.cell.settings.seed, (victim,))
            for one in new
            if one.refusal is None
            for victim in one.victims
        ],
        [*cells, *(one.id for one in changed)],
    )
    store.set("changes", [as_stored(one) for one in changed])
    computed = _compute(store, {one.id: one.cell for one in changed}, known, listener)
    refusals = {cell.cell: cell.refusal for cell in store.cells() if cell.refusal is not None}
    store.set("updates", told(cells, store.get("changes"), refusals, store.results(), store.folder, known))
    return computed


def _open(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Cells in which every image came back, so that no condition is left to take away."""
    short = {str(row["cell"]) for row in rows if not row.get("success")}
    return {str(row["cell"]) for row in rows} - short


def _tell(store: Store, listener: Listener) -> None:
    counts = store.counts()
    listener.update(counts["done"] + counts["failed"], counts["cases"], counts["failed"])


def _check_same(store: Store, fingerprint: str) -> None:
    found = store.get("replay")
    if found is None and store.cells():
        raise StoreError(f"{store.folder}: holds an audit, no replay; choose another --out")
    if found is None:
        store.set("replay", fingerprint)
        store.set("created", now())
    elif found != fingerprint:
        raise StoreError(
            f"{store.folder}: holds a replay of other updates, attacks or settings; choose another --out, or give the same"
        )


def _cells(settings: Replay) -> Iterator[ReplayCell]:
    rounds: dict[int, list[Recorded]] = {}
    for update in settings.updates:
        rounds.setdefault(update.round, []).append(update)
    for updates in rounds.values():
        for entry in settings.attacks:
            yield ReplayCell(settings, tuple(updates), entry, cell_columns(settings, updates, entry))


def _together(cell: ReplayCell) -> Iterator[tuple[int, ...]]:
    """Victims that one call attacks: clients that received the same model and trained on equally many images."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for victim, update in enumerate(cell.updates):
        sent = cell.settings.recording.sent_to(update)
        alike = None if sent is None else sent.sha256, update.examples, update.kind, update.config.get("clients")
        groups.setdefault(alike, []).append(victim)
    for victims in groups.values():
        for start in range(0, len(victims), CHUNK_VICTIMS):
            yield tuple(victims[start : start + CHUNK_VICTIMS])


def _rows(cell: ReplayCell, chunk: Chunk, known: Known, out: Path) -> list[Row]:
    settings, attack, started = cell.settings, cell.entry.attack, time.perf_counter()
    outcomes: dict[int, Any] = {}
    observations: dict[int, Observation] = {}
    truths: dict[int, GroundTruth | None] = {}
    for victim in chunk.victims:
        try:
            found, truths[victim] = cell.case(victim, known)
        except InputError as error:
            outcomes[victim] = Failure(str(error))
            truths[victim] = None if settings.truths is None else settings.truths.of(cell.updates[victim])
            continue
        if all(is_finite(tensor) for tensor in found.update.trainable.values()):
            observations[victim] = found
        else:
            outcomes[victim] = Failure(
                "the update is not finite: the client's own training diverged, nothing was attacked"
            )
    for some in _same_tensors(observations):
        keys = [case_id(cell.base or chunk.cell, settings.seed, victim) for victim in some]
        streams = [generator("attack", settings.seed, key) for key in keys]
        attacked = attack.reconstruct([observations[victim] for victim in some], streams, NO_SESSION)
        outcomes.update(zip(some, attacked, strict=True))
    seconds = (time.perf_counter() - started) / len(chunk.victims)
    columns = {"cell": chunk.cell, **{name: cell.columns[name] for name in (*AXES, "adaptive", "oracle")}}
    return [
        row
        for victim in chunk.victims
        for row in replayed_rows(
            settings,
            Place(columns, victim, cell.updates[victim]),
            outcomes[victim],
            truths[victim],
            seconds,
            out,
            attack.legacy_convention,
        )
    ]


def _same_tensors(observations: Mapping[int, Observation]) -> Iterator[list[int]]:
    """Victims whose updates hold the same tensors: a client may send fewer than another."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for victim, found in observations.items():
        groups.setdefault(tuple(found.update.trainable), []).append(victim)
    yield from groups.values()

"""Runs a replay, or what is left of it, and writes the same tables as an audit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medpfl.audit.entries import AXES, AttackEntry
from medpfl.audit.plan import CHUNK_VICTIMS, Chunk, case_id
from medpfl.audit.replay.columns import cell_columns, cell_id, refusal, told
from medpfl.audit.replay.observing import observe
from medpfl.audit.replay.rows import Place, replayed_rows
from medpfl.audit.replay.settings import Replay
from medpfl.audit.replay.summary import write_tables
from medpfl.audit.rows import Row
from medpfl.audit.runner import Listener, NoListener
from medpfl.audit.store import Store, StoredCell
from medpfl.audit.tables import now
from medpfl.core.domain import Failure, Observation
from medpfl.core.errors import DataError, ModelError, StoreError
from medpfl.core.functional import is_finite
from medpfl.core.seeding import content_hash, generator
from medpfl.core.session import NO_SESSION
from medpfl.federation.recording import Recorded


@dataclass(frozen=True)
class ReplaySummary:
    """What became of a replay: its folder, counts of cases, rows of `cells.csv`, and how many were computed now."""

    folder: Path
    counts: Mapping[str, int]
    cells: tuple[dict[str, Any], ...]
    computed: int


@dataclass(frozen=True)
class _Cell:
    """One attack on one round of one recording; its victims are the round's clients in the order of their names."""

    settings: Replay
    updates: tuple[Recorded, ...]
    entry: AttackEntry
    columns: Mapping[str, Any]


def replay(parts: Sequence[Replay], out: Path, listener: Listener | None = None) -> ReplaySummary:
    """Attacks every chosen update of every recording with every attack and writes tables and summary into `out`.

    Each recording is a data set of its own in the tables. Run again it does what is left. Raises StoreError where
    `out` holds something else.
    """
    with Store(out).open() as store:
        _check_same(store, content_hash([one.fingerprint for one in parts]))
        cells = {cell_id(cell.columns): cell for one in parts for cell in _cells(one)}
        known = {cell.cell for cell in store.cells()}
        new = [
            StoredCell(name, cell.settings.fingerprint, dict(cell.columns), refusal(cell.settings, cell.updates, cell.entry))
            for name, cell in cells.items()
            if name not in known
        ]  # fmt: skip
        chunks = [
            Chunk(one.cell, cells[one.cell].settings.seed, victims)
            for one in new
            if one.refusal is None
            for victims in _together(cells[one.cell])
        ]
        store.add_cells(new, chunks, list(cells))
        pending = store.pending()
        listener = listener or NoListener()
        for chunk in pending:
            _tell(store, listener)
            store.finish(chunk, _rows(cells[chunk.cell], chunk, out))
        _tell(store, listener)
        rows = write_tables(store, parts)
        return ReplaySummary(out, store.counts(), tuple(rows), sum(len(chunk.victims) for chunk in pending))


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


def _cells(settings: Replay) -> Iterator[_Cell]:
    rounds: dict[int, list[Recorded]] = {}
    for update in settings.updates:
        rounds.setdefault(update.round, []).append(update)
    for updates in rounds.values():
        for entry in settings.attacks:
            yield _Cell(settings, tuple(updates), entry, cell_columns(settings, updates, entry))


def _together(cell: _Cell) -> Iterator[tuple[int, ...]]:
    """Victims that one call attacks: clients that received the same model and trained on equally many images."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for victim, update in enumerate(cell.updates):
        sent = cell.settings.recording.sent_to(update)
        alike = None if sent is None else sent.sha256, update.examples, update.kind, update.config.get("clients")
        groups.setdefault(alike, []).append(victim)
    for victims in groups.values():
        for start in range(0, len(victims), CHUNK_VICTIMS):
            yield tuple(victims[start : start + CHUNK_VICTIMS])


def _rows(cell: _Cell, chunk: Chunk, out: Path) -> list[Row]:
    settings, entry, started = cell.settings, cell.entry, time.perf_counter()
    reads = entry.attack.requires() | entry.attack.uses()
    outcomes: dict[int, Any] = {}
    observations: dict[int, Observation] = {}
    for victim in chunk.victims:
        try:
            found = observe(
                settings.recording,
                cell.updates[victim],
                settings.model,
                settings.known_recipe,
                examples=settings.examples,
                auxiliary=settings.auxiliary if "auxiliary" in reads else None,
                defense=told(settings, entry),
            )
        except (DataError, ModelError) as error:
            outcomes[victim] = Failure(str(error))
            continue
        if all(is_finite(tensor) for tensor in found.update.trainable.values()):
            observations[victim] = found
        else:
            outcomes[victim] = Failure(
                "the update is not finite: the client's own training diverged, nothing was attacked"
            )
    for some in _same_tensors(observations):
        streams = [generator("attack", settings.seed, case_id(chunk.cell, settings.seed, victim)) for victim in some]
        attacked = entry.attack.reconstruct([observations[victim] for victim in some], streams, NO_SESSION)
        outcomes.update(zip(some, attacked, strict=True))
    seconds = (time.perf_counter() - started) / len(chunk.victims)
    columns = {"cell": chunk.cell, **{name: cell.columns[name] for name in (*AXES, "adaptive")}}
    return [
        row
        for victim in chunk.victims
        for row in replayed_rows(
            settings,
            Place(columns, victim, cell.updates[victim]),
            outcomes[victim],
            seconds,
            out,
            entry.attack.legacy_convention,
        )
    ]


def _same_tensors(observations: Mapping[int, Observation]) -> Iterator[list[int]]:
    """Victims whose updates hold the same tensors: a client may send fewer than another."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for victim, found in observations.items():
        groups.setdefault(tuple(found.update.trainable), []).append(victim)
    yield from groups.values()

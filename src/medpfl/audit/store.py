"""The audit's SQLite store: cells, chunks, cases and results of one output folder."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medpfl.audit.plan import Chunk, case_id
from medpfl.core.errors import StoreError
from medpfl.core.files import WAY_ON, locked, make_private

SCHEMA = 1
"""Version of the store and of the files beside it."""

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS cells (
    cell TEXT PRIMARY KEY, ordinal INTEGER NOT NULL, fingerprint TEXT NOT NULL, columns TEXT NOT NULL, refusal TEXT
);
CREATE TABLE IF NOT EXISTS chunks (
    chunk TEXT PRIMARY KEY, cell TEXT NOT NULL, seed INTEGER NOT NULL, victims TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'pending', crashes INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS results (
    case_id TEXT NOT NULL, position INTEGER NOT NULL, cell TEXT NOT NULL, seed INTEGER NOT NULL,
    victim INTEGER NOT NULL, status TEXT NOT NULL, data TEXT NOT NULL, PRIMARY KEY (case_id, position)
);
CREATE TABLE IF NOT EXISTS utility (key TEXT PRIMARY KEY, name TEXT NOT NULL, status TEXT NOT NULL, data TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS results_by_cell ON results (cell, seed, victim, position);
"""


@dataclass(frozen=True)
class StoredCell:
    """A cell as stored: its columns for `cells.csv`, and why it was refused if it was."""

    cell: str
    fingerprint: str
    columns: Mapping[str, Any]
    refusal: str | None


class Store:
    """Owns `audit.sqlite` of one folder. One process at a time writes to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "audit.sqlite"
        self._connection: sqlite3.Connection | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[Store]:
        """Opens and locks the store; creates the folder with mode 0700. Raises StoreError."""
        with contextlib.ExitStack() as opened:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._check_empty_or_audit()
                self.folder.chmod(0o700)
                opened.enter_context(self._locked())
                make_private(self.path)  # SQLite gives its journal the same mode
                connection = sqlite3.connect(self.path, timeout=1.0, isolation_level=None)
                opened.enter_context(contextlib.closing(connection))
            except PermissionError:
                raise StoreError(f"{self.folder}: no permission to write there; choose another --out") from None
            except (OSError, sqlite3.Error) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else error
                raise StoreError(
                    f"{self.folder}: cannot be used as output folder ({reason}); choose another --out"
                ) from None
            self._connection = connection
            try:
                self._create_tables()
                self._check_schema()
                yield self
            finally:
                self._connection = None

    def _check_empty_or_audit(self) -> None:
        """An empty store is none: it was cut off before its tables were there, or it lost them."""
        if self.path.exists() and (self.path.is_dir() or self.path.stat().st_size):
            return
        occupied = [found.name for found in self.folder.iterdir() if not found.name.startswith((".", self.path.name))]
        if occupied:
            raise StoreError(
                f"{self.folder}: the folder is not empty and holds no audit ({sorted(occupied)[0]} without a usable "
                f"{self.path.name}); choose an empty --out"
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(self.folder / ".lock", wait=False))
            except BlockingIOError:
                raise StoreError(
                    f"{self.folder}: another audit is running in this folder; wait for it or stop it"
                ) from None
            yield

    def _create_tables(self) -> None:
        with self.transaction() as connection:
            found = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if found and not found >= {"meta", "cells", "chunks", "results"}:
            raise StoreError(f"{self.path}: is a database of something else, no audit; choose another --out")
        with self.transaction() as connection:
            connection.executescript(f"BEGIN; {_TABLES} COMMIT;")

    @property
    def _database(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreError(f"{self.path}: the store is not open")
        return self._connection

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing. A full disk or a broken file becomes a StoreError that says how to go on."""
        try:
            with self._database as connection:
                yield connection
        except sqlite3.OperationalError as error:
            raise StoreError(f"{self.path}: {error}; nothing that was finished is lost: {WAY_ON}") from None
        except (sqlite3.DatabaseError, json.JSONDecodeError) as error:
            raise StoreError(
                f"{self.path}: is damaged ({error}); put back a copy of it, or use another --out: "
                "the tables and images beside it are left as they are"
            ) from None

    def _check_schema(self) -> None:
        found = self.get("schema")
        if found is None:
            self.set("schema", SCHEMA)
        elif found != SCHEMA:
            raise StoreError(
                f"{self.path}: written with schema {found}, this version reads {SCHEMA}; use another --out"
            )

    def get(self, key: str) -> Any:
        """A stored value, or None."""
        with self.transaction() as connection:
            row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
            return None if row is None else json.loads(row[0])

    def set(self, key: str, value: Any) -> None:
        """Stores a JSON-like value."""
        with self.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def cells(self) -> list[StoredCell]:
        """All cells in grid order."""
        with self.transaction() as connection:
            rows = connection.execute(
                "SELECT cell, fingerprint, columns, refusal FROM cells ORDER BY ordinal"
            ).fetchall()
            return [
                StoredCell(cell, fingerprint, json.loads(columns), refusal)
                for cell, fingerprint, columns, refusal in rows
            ]

    def add_cells(self, cells: Sequence[StoredCell], chunks: Sequence[Chunk], order: Sequence[str]) -> None:
        """Adds new cells with their chunks and brings all cells into the given order."""
        with self.transaction() as connection:
            connection.execute("BEGIN")
            connection.executemany(
                "INSERT INTO cells VALUES (?, 0, ?, ?, ?)",
                [(cell.cell, cell.fingerprint, json.dumps(cell.columns), cell.refusal) for cell in cells],
            )
            connection.executemany(
                "UPDATE cells SET ordinal = ? WHERE cell = ?", [(i, cell) for i, cell in enumerate(order)]
            )
            self._insert_chunks(connection, chunks)

    def remove_cells(self, cells: Sequence[str]) -> None:
        """Forgets cells with their chunks and results."""
        with self.transaction() as connection:
            connection.execute("BEGIN")
            for table in ("results", "chunks", "cells"):
                connection.executemany(f"DELETE FROM {table} WHERE cell = ?", [(cell,) for cell in cells])

    @staticmethod
    def _insert_chunks(connection: sqlite3.Connection, chunks: Sequence[Chunk]) -> None:
        connection.executemany(
            "INSERT OR IGNORE INTO chunks (chunk, cell, seed, victims) VALUES (?, ?, ?, ?)",
            [(chunk.id, chunk.cell, chunk.seed, json.dumps(chunk.victims)) for chunk in chunks],
        )

    def pending(self) -> list[Chunk]:
        """Chunks that are still to be computed, in the order in which they were planned."""
        with self.transaction() as connection:
            rows = connection.execute(
                "SELECT cell, seed, victims FROM chunks WHERE status = 'pending' ORDER BY rowid"
            ).fetchall()
            return [Chunk(cell, seed, tuple(json.loads(victims))) for cell, seed, victims in rows]

    def crashed(self, chunk: Chunk) -> int:
        """Counts that a chunk killed its process; returns how often it has."""
        with self.transaction() as connection:
            connection.execute("UPDATE chunks SET crashes = crashes + 1 WHERE chunk = ?", (chunk.id,))
            row = connection.execute("SELECT crashes FROM chunks WHERE chunk = ?", (chunk.id,)).fetchone()
        return int(row[0])

    def split(self, chunk: Chunk) -> list[Chunk]:
        """Replaces a chunk by one chunk per case."""
        singles = [Chunk(chunk.cell, chunk.seed, (victim,)) for victim in chunk.victims]
        with self.transaction() as connection:
            connection.execute("BEGIN")
            connection.execute("UPDATE chunks SET status = 'split' WHERE chunk = ?", (chunk.id,))
            self._insert_chunks(connection, singles)
        return singles

    def finish(self, chunk: Chunk, rows: Sequence[Mapping[str, Any]]) -> None:
        """Stores the result rows of a chunk and marks it done, in one transaction."""
        with self.transaction() as connection:
            connection.execute("BEGIN")
            connection.executemany(
                "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        case_id(chunk.cell, chunk.seed, row["victim"]),
                        row["position"],
                        chunk.cell,
                        chunk.seed,
                        row["victim"],
                        row["status"],
                        json.dumps(dict(row)),
                    )
                    for row in rows
                ],
            )
            connection.execute("UPDATE chunks SET status = 'done' WHERE chunk = ?", (chunk.id,))

    def keep_utility(self, key: str, name: str, status: str, data: Mapping[str, Any]) -> None:
        """Stores what a utility run found (`done`), or why it has no result (`failed`)."""
        with self.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO utility VALUES (?, ?, ?, ?)", (key, name, status, json.dumps(data))
            )

    def utility(self) -> dict[str, dict[str, Any]]:
        """Every utility run that was tried, by its key: what it found, with its `status`."""
        with self.transaction() as connection:
            rows = connection.execute("SELECT key, status, data FROM utility").fetchall()
            return {key: {**json.loads(data), "status": status} for key, status, data in rows}

    def results(self) -> list[dict[str, Any]]:
        """All result rows, sorted by cell (grid order), seed, victim and position."""
        with self.transaction() as connection:
            rows = connection.execute(
                "SELECT results.data FROM results JOIN cells USING (cell) ORDER BY cell, victim, position, seed"
            ).fetchall()
            return [json.loads(row[0]) for row in rows]

    def counts(self, counted: Callable[[str], bool] = lambda _: True) -> dict[str, int]:
        """Cases by status, and all planned ones under `cases`, of the cells whose id is `counted`.

        A case is blocked if all its clients withheld their updates: `failed` or `done` comes behind it in the alphabet.
        """
        with self.transaction() as connection:
            found = connection.execute(
                "SELECT cell, status, COUNT(*) FROM (SELECT cell, MAX(status) AS status FROM results GROUP BY case_id) "
                "GROUP BY cell, status"
            ).fetchall()
            planned = connection.execute("SELECT cell, victims FROM chunks WHERE status != 'split'").fetchall()
        counts = {"cases": sum(len(json.loads(victims)) for cell, victims in planned if counted(cell))}
        for status in ("done", "failed", "blocked"):
            counts[status] = sum(
                number for cell, found_status, number in found if found_status == status and counted(cell)
            )
        return counts

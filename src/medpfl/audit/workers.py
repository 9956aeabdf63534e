"""Worker processes: each computes one chunk at a time; a dead one is noticed and replaced."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from medpfl.audit.execute import compute, failed_rows
from medpfl.audit.grid import cells
from medpfl.audit.materials import Materials
from medpfl.audit.plan import Chunk
from medpfl.audit.snapshots import FileSession
from medpfl.audit.spec import parse_spec
from medpfl.core.errors import InputError

_CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know, as plain values."""

    plain: Mapping[str, Any]
    base: Path
    out: Path
    images_per_victim: dict[str, int]
    threads: int


@dataclass(frozen=True)
class Progress:
    """A chunk has come so far (0 to 1)."""

    chunk: Chunk
    fraction: float


@dataclass(frozen=True)
class Finished:
    """A chunk's result rows."""

    chunk: Chunk
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Raised:
    """A chunk raised: the reason in one line, the traceback for the log, and whether the user caused it."""

    chunk: Chunk
    reason: str
    traceback: str
    input_error: bool


@dataclass(frozen=True)
class Died:
    """A chunk killed its process."""

    chunk: Chunk
    exit_code: int | None


Event = Progress | Finished | Raised | Died


class Computer:
    """Computes chunks in this process; used by workers and by audits without worker processes."""

    def __init__(self, job: Job) -> None:
        spec = parse_spec(job.plain, job.base)
        self._job = job
        self._cells = {cell.id: cell for cell in cells(spec)}
        self._materials = Materials(spec, job.out / "cache", job.images_per_victim)

    def run(self, chunk: Chunk, report: Any, give_up: str | None = None) -> Finished | Raised:
        """The rows of a chunk; `give_up` is the reason why its cases count as failed without being computed."""
        cell = self._cells[chunk.cell]
        session = FileSession(self._job.out / "snapshots", chunk.id, lambda fraction: report(Progress(chunk, fraction)))
        threads = torch.get_num_threads()
        torch.set_num_threads(self._job.threads)
        try:
            if give_up is not None:
                return Finished(chunk, failed_rows(self._materials, cell, chunk, give_up))
            return Finished(chunk, compute(self._materials, cell, chunk, self._job.out, session))
        except InputError as error:
            return Raised(chunk, str(error), traceback.format_exc(), input_error=True)
        except Exception as error:  # noqa: BLE001 - whatever an attack raises fails its cases with the reason, not the audit
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return Raised(chunk, reason, traceback.format_exc(), input_error=False)
        finally:
            torch.set_num_threads(threads)


def _work(job: Job, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    computer = Computer(job)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(computer.run(task[0], connection.send, task[1]))


class Pool:
    """Worker processes that take chunks. Use as a context manager; leaving it ends them."""

    def __init__(self, job: Job, workers: int) -> None:
        self._job = job
        self._size = workers
        self._busy: dict[Connection, tuple[SpawnProcess, Chunk]] = {}
        self._idle: list[tuple[SpawnProcess, Connection]] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for process, connection in [*self._idle, *((process, c) for c, (process, _) in self._busy.items())]:
            process.terminate()
            process.join(5)
            connection.close()

    @property
    def free(self) -> bool:
        """Whether another chunk can be started now."""
        return len(self._busy) < self._size

    @property
    def active(self) -> bool:
        """Whether any chunk is running."""
        return bool(self._busy)

    def start(self, chunk: Chunk, give_up: str | None = None) -> None:
        """Hands a chunk to an idle worker, or to a new one."""
        process, connection = self._idle.pop() if self._idle else self._spawn()
        connection.send((chunk, give_up))
        self._busy[connection] = (process, chunk)

    def _spawn(self) -> tuple[SpawnProcess, Connection]:
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_work, args=(self._job, theirs), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def events(self, timeout: float) -> list[Event]:
        """What has happened since the last call, after waiting for at most `timeout` seconds."""
        found: list[Event] = []
        for ready in wait(list(self._busy), timeout):
            assert isinstance(ready, Connection)  # only connections were waited for
            process, chunk = self._busy[ready]
            try:
                event: Event = ready.recv()
            except (EOFError, ConnectionResetError):
                process.join(5)
                del self._busy[ready]
                found.append(Died(chunk, process.exitcode))
                continue
            if not isinstance(event, Progress):
                del self._busy[ready]
                self._idle.append((process, ready))
            found.append(event)
        return found

"""Worker processes: each computes one task at a time; a dead one is noticed and replaced."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from medpfl.audit.clients_needed import ClientsNeeded
from medpfl.audit.diagnosis import extra_cells, sweep
from medpfl.audit.execute import compute, failed_rows
from medpfl.audit.grid import Cell, cells
from medpfl.audit.materials import Materials
from medpfl.audit.plan import Chunk, Plan
from medpfl.audit.snapshots import FileSession
from medpfl.audit.spec import parse_spec
from medpfl.audit.utility import UtilityRun, measure
from medpfl.core.devices import device_of_worker, repeatable
from medpfl.core.errors import InputError
from medpfl.core.memory import is_out_of_memory, memory_budget

_CONTEXT = multiprocessing.get_context("spawn")
OUT_OF_MEMORY = "out of memory: let each worker take less (`memory:` in the spec), or use fewer workers"

_STOPPING = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know, as plain values."""

    plain: Mapping[str, Any]
    base: Path
    out: Path
    clients_needed: Mapping[str, ClientsNeeded]
    plan: Plan
    trained: Mapping[str, str]
    """Fingerprints of the trained models that earlier results were computed with."""


Task = Chunk | UtilityRun
"""What a worker does at a time: attacks on cases, or a federation whose utility is measured."""


@dataclass(frozen=True)
class Progress:
    """A task has come so far (0 to 1)."""

    task: Task
    fraction: float


@dataclass(frozen=True)
class Training:
    """A model is being trained before its cases can be computed; it has come so far (0 to 1)."""

    model: str
    fraction: float


@dataclass(frozen=True)
class Finished:
    """A chunk's result rows, and the fingerprints of the trained models that this process has used so far."""

    chunk: Chunk
    rows: list[dict[str, Any]]
    trained: Mapping[str, str]


@dataclass(frozen=True)
class Measured:
    """What a utility run found."""

    task: UtilityRun
    found: Mapping[str, Any]


@dataclass(frozen=True)
class Raised:
    """A task raised: the reason in one line, the traceback for the log, and whether the user caused it."""

    task: Task
    reason: str
    traceback: str
    input_error: bool


@dataclass(frozen=True)
class Died:
    """A task killed its process."""

    task: Task
    exit_code: int | None


Event = Progress | Training | Finished | Measured | Raised | Died


class Computer:
    """Computes tasks in this process; used by workers and by audits without worker processes."""

    def __init__(self, job: Job, number: int = 0) -> None:
        self._job = job
        self._device = device_of_worker(job.plan.device, number)
        self._known: tuple[dict[str, Cell], Materials] | None = None
        self._report: Callable[[Progress | Training], object] = lambda _: None

    def _prepared(self) -> tuple[dict[str, Cell], Materials]:
        """Cells by id, and what their cases are made of; made with the first chunk, so that its errors are reported."""
        if self._known is None:
            spec = parse_spec(self._job.plain, self._job.base)
            materials = Materials(
                spec,
                self._job.out / "cache",
                self._job.clients_needed,
                self._job.plan.threads,
                self._device,
                lambda model, fraction: self._report(Training(model, fraction)),
                self._job.trained,
            )
            found = cells(spec)
            found += extra_cells(sweep(spec, found))
            self._known = ({cell.id: cell for cell in found}, materials)
        return self._known

    def run(
        self, task: Task, report: Callable[[Progress | Training], object], give_up: str | None = None
    ) -> Finished | Measured | Raised:
        """What a task gives; `give_up` is the reason why a chunk's cases count as failed without being computed."""
        self._report = report
        session = FileSession(self._job.out / "snapshots", task.id, lambda fraction: report(Progress(task, fraction)))
        try:
            with repeatable(self._device, self._job.plan.threads), memory_budget(self._job.plan.memory):
                known, materials = self._prepared()
                cell = known[task.cell]
                if isinstance(task, UtilityRun):
                    utility = materials.spec.utility
                    assert utility is not None  # runs are planned where it is asked for only
                    return Measured(task, measure(cell, task, utility, materials, session))
                if give_up is not None:
                    rows = failed_rows(materials, cell, task, give_up, self._job.out)
                else:
                    rows = compute(materials, cell, task, self._job.out, session)
            return Finished(task, rows, dict(materials.trained))
        except InputError as error:
            return Raised(task, str(error), traceback.format_exc(), input_error=True)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever an attack raises fails its cases with the reason, not the audit
            reason = OUT_OF_MEMORY if is_out_of_memory(error) else f"{type(error).__name__}: {error}".splitlines()[0]
            return Raised(task, reason, traceback.format_exc(), input_error=False)


def _work(job: Job, number: int, connection: Connection) -> None:
    for stopping in _STOPPING:  # the parent decides when its workers end, also when both get the signal
        signal.signal(stopping, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    computer = Computer(job, number)
    while True:
        task = connection.recv()
        connection.send(computer.run(task[0], connection.send, task[1]))


def _end_with_parent() -> None:
    """Ends this process at once when its parent is gone, however that ended: nobody waits for the results."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM wait; processes that are started here are spared them before they can ignore them.

    The mask is for the new process. It does not hold back this one, where any other thread may take a signal for all:
    that is what the handlers are for.
    """
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()  # it would let the signals through when the first process is started
    held: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: held.append(number)) for number in _STOPPING}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


class Pool:
    """Worker processes that take tasks. Use as a context manager; leaving it ends them."""

    def __init__(self, job: Job, workers: int) -> None:
        self._job = job
        self._size = workers
        self._spawned = 0
        self._busy: dict[Connection, tuple[SpawnProcess, Task]] = {}
        self._idle: list[tuple[SpawnProcess, Connection]] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for process, connection in [*self._idle, *((process, c) for c, (process, _) in self._busy.items())]:
            process.kill()
            process.join(5)
            connection.close()

    @property
    def free(self) -> bool:
        """Whether another task can be started now."""
        return len(self._busy) < self._size

    @property
    def active(self) -> bool:
        """Whether any task is running."""
        return bool(self._busy)

    def start(self, task: Task, give_up: str | None = None) -> None:
        """Hands a task to an idle worker, or to a new one."""
        while True:
            if not self._idle:
                self._spawn()
            process, connection = self._idle[-1]
            self._busy[connection] = (process, task)
            self._idle.pop()
            try:
                connection.send((task, give_up))
            except OSError:  # it was killed while it had nothing to do: no task's fault
                del self._busy[connection]
                process.join(5)
                connection.close()
                continue
            return

    def _spawn(self) -> None:
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_work, args=(self._job, self._spawned, theirs), daemon=True)
        with _signals_held():
            process.start()
            self._idle.append((process, ours))
        self._spawned += 1
        theirs.close()

    def events(self, timeout: float) -> list[Event]:
        """What has happened since the last call, after waiting for at most `timeout` seconds."""
        found: list[Event] = []
        for ready in wait(list(self._busy), timeout):
            assert isinstance(ready, Connection)  # only connections were waited for
            process, task = self._busy[ready]
            try:
                event: Event = ready.recv()
            except (EOFError, OSError):
                process.join(5)
                del self._busy[ready]
                found.append(Died(task, process.exitcode))
                continue
            if not isinstance(event, Progress | Training):
                del self._busy[ready]
                self._idle.append((process, ready))
            found.append(event)
        return found

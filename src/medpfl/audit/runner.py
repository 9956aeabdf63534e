"""Runs an audit: stores the plan, hands out chunks, stores results, carries on where an earlier run stopped."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from medpfl.audit.context import describe
from medpfl.audit.guarantees import keep_guarantees
from medpfl.audit.plan import Chunk, Plan, cores, make_plan
from medpfl.audit.preparation import prepare
from medpfl.audit.prices import Frontier
from medpfl.audit.registration import kept_plan, register, still_diagnosed, still_measured
from medpfl.audit.sizes import fitting_workers
from medpfl.audit.spec import Spec
from medpfl.audit.store import Store
from medpfl.audit.tables import now, spec_as_run, write_tables
from medpfl.audit.trained_models import another_trained_model
from medpfl.audit.utility import UtilityRun
from medpfl.audit.utility_results import pending_utility
from medpfl.audit.workers import Computer, Died, Event, Finished, Job, Measured, Pool, Progress, Raised, Task, Training
from medpfl.core.errors import InputError as _InputError
from medpfl.core.errors import Interrupted
from medpfl.core.files import append, write_atomically

TABLES_EVERY = 5.0
"""Seconds between two rewrites of the tables while chunks finish."""


class Listener(Protocol):
    """Is told how an audit comes along."""

    def update(self, done: float, total: int, failed: int) -> None:
        """`done` of `total` cases are finished, running ones counted by their fraction; `failed` failed so far."""

    def training(self, model: str, fraction: float) -> None:
        """A model is being trained before its cases can be computed; 1 is the end."""

    def utility(self, done: float, total: int) -> None:
        """`done` of `total` federations are trained to measure utility, running ones counted by their fraction."""


class NoListener:
    """Tells nobody."""

    def update(self, done: float, total: int, failed: int) -> None:
        """Does nothing."""

    def training(self, model: str, fraction: float) -> None:
        """Does nothing."""

    def utility(self, done: float, total: int) -> None:
        """Does nothing."""


@dataclass(frozen=True)
class AuditSummary:
    """What became of an audit: its folder, counts of cases by status, its cells as in `cells.csv`, what was run now.

    `cells` are those of the grid. Those of the diagnosis are in `counts` only, and in what `diagnosis` says of each
    cell of the grid (as in `summary.json`). `utility` is what `summary.json` says under that key, None if not
    measured, and `frontiers` what defenses leave to attackers and cost.
    """

    folder: Path
    counts: dict[str, int]
    cells: tuple[dict[str, Any], ...]
    computed: int
    diagnosis: tuple[dict[str, Any], ...] = ()
    utility: Mapping[str, Any] | None = None
    frontiers: tuple[Frontier, ...] = ()


def run_audit(
    spec: Spec,
    out: Path,
    *,
    workers: int | None = None,
    device: str | None = None,
    listener: Listener | None = None,
) -> AuditSummary:
    """Runs the audit, or what is left of it, and writes the tables. The report is written by `medpfl.report`.

    workers: number of worker processes; 0 computes in this process; default: see `default_workers`. device: `auto`,
    `cpu`, `cuda` or `cuda:N`; default the spec's.
    Raises InputError (nothing is lost) and Interrupted (Ctrl-C; the folder can be resumed).
    """
    out = Path(out)
    store = Store(out)
    try:
        with store.open():
            return _run(spec, out, store, workers, device, listener or NoListener())
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; run the same command again to go on with what is in {out}") from None


def _run(
    spec: Spec, out: Path, store: Store, workers: int | None, device: str | None, listener: Listener
) -> AuditSummary:
    plan = kept_plan(store, make_plan(spec, device, store.get("plan")))
    spec = still_measured(store, still_diagnosed(store, spec))
    prepared = prepare(spec, out / "cache", plan)
    register(store, prepared)
    pending: list[Task] = [*store.pending(), *pending_utility(store, prepared.utility)]
    if pending:
        store.set("context", describe(spec, prepared.cells, prepared.materials))
    audited = [cell for cell in prepared.cells if cell.id not in prepared.refusals]
    keep_guarantees(store, spec, audited, prepared.materials)
    write_atomically(out / "spec.yaml", spec_as_run(spec, out))
    trained = store.get("trained_models") or {}
    job = Job(spec.plain, spec.base, out, dict(prepared.clients_needed), plan, trained)
    try:
        _Loop(store, spec, job, listener).run(
            pending, default_workers(plan, prepared.round_sizes) if workers is None else workers
        )
    except KeyboardInterrupt:
        write_tables(store, spec)
        raise
    tables = write_tables(store, spec)
    return AuditSummary(
        out, store.counts(), tables.cells, len(pending), tables.diagnosis, tables.utility, tables.frontiers
    )


def default_workers(plan: Plan, round_sizes: Iterable[int] = ()) -> int:
    """One process per core that this process may use, at most 8, or fewer with more threads; on GPUs one for each.

    round_sizes: bytes of the cells' rounds with crafted models; as many processes as hold the largest side by side.
    """
    if plan.where.type == "cuda":
        return torch.cuda.device_count() if plan.device == "cuda" else 1
    return fitting_workers(max(1, min(cores() // plan.threads, 8)), round_sizes)


class _Loop:
    """Hands out tasks until none is left, and decides what becomes of those that raise or kill their process."""

    def __init__(self, store: Store, spec: Spec, job: Job, listener: Listener) -> None:
        self._store = store
        self._spec = spec
        self._job = job
        self._listener = listener
        self._queue: list[tuple[Task, str | None]] = []
        self._utility: dict[str, float] = {}
        self._crashed: set[str] = set()
        self._fractions: dict[str, float] = {}
        self._written = time.monotonic()
        self._trained = dict(job.trained)

    def run(self, pending: Sequence[Task], workers: int) -> None:
        self._queue = [(task, None) for task in pending]
        self._utility = {task.id: 0.0 for task in pending if isinstance(task, UtilityRun)}
        self._tell()
        if workers == 0:
            computer = Computer(self._job) if self._queue else None
            while self._queue and computer is not None:
                task, give_up = self._queue.pop(0)
                self._handle(computer.run(task, self._handle, give_up))
            return
        with Pool(self._job, workers) as pool:
            while self._queue or pool.active:
                while self._queue and pool.free:
                    pool.start(*self._queue.pop(0))
                for event in pool.events(timeout=1.0):
                    self._handle(event)

    def _handle(self, event: Event) -> None:
        if isinstance(event, Training):
            self._listener.training(event.model, event.fraction)
            return
        if isinstance(event, Progress):
            self._progress(event.task, event.fraction)
        elif isinstance(event, Finished):
            self._check_trained(event.trained)
            self._store.finish(event.chunk, event.rows)
            self._fractions.pop(event.chunk.id, None)
            self._finish(event.chunk)
        elif isinstance(event, Measured):
            self._store.keep_utility(event.task.key, event.task.id, "done", event.found)
            self._progress(event.task, 1.0)
            self._finish(event.task)
        elif isinstance(event, Raised):
            if event.input_error:
                raise _InputError(event.reason)
            self._log(event.traceback)
            self._again(event.task, event.reason)
        else:
            self._died(event)
        self._tell()

    def _progress(self, task: Task, fraction: float) -> None:
        if isinstance(task, UtilityRun):
            self._utility[task.id] = fraction
        else:
            self._fractions[task.id] = fraction * len(task.victims)

    def _finish(self, task: Task) -> None:
        from medpfl.audit.snapshots import FileSession

        FileSession(self._job.out / "snapshots", task.id, lambda _: None).close()
        if time.monotonic() - self._written > TABLES_EVERY:
            write_tables(self._store, self._spec)
            self._written = time.monotonic()

    def _check_trained(self, found: Mapping[str, str]) -> None:
        """Remembers trained models when they are first used."""
        new = {name: fingerprint for name, fingerprint in found.items() if name not in self._trained}
        for name, fingerprint in found.items():
            if self._trained.get(name, fingerprint) != fingerprint:
                raise another_trained_model(name, self._job.out)
        if new:
            self._trained |= new
            self._store.set("trained_models", self._trained)

    def _again(self, task: Task, reason: str) -> None:
        """A chunk that failed as a whole is run case by case; a single case, and a utility run, fail with the reason."""
        if isinstance(task, UtilityRun):
            self._store.keep_utility(task.key, task.id, "failed", {"reason": reason})
            self._progress(task, 1.0)
            return
        self._fractions.pop(task.id, None)
        if len(task.victims) > 1:
            self._queue[:0] = [(single, None) for single in self._store.split(task)]
        else:
            self._queue.insert(0, (task, reason))

    def _died(self, event: Died) -> None:
        code = event.exit_code
        how = f"killed by signal {-code}; out of memory?" if code is not None and code < 0 else f"exit code {code}"
        reason = f"its process ended twice ({how})"
        self._log(f"{event.task.id}: the process ended ({how})\n")
        if self._first_crash(event.task):
            self._queue.insert(0, (event.task, None))
        else:
            self._again(event.task, reason)

    def _first_crash(self, task: Task) -> bool:
        if isinstance(task, Chunk):
            return self._store.crashed(task) < 2
        before = task.id in self._crashed
        self._crashed.add(task.id)
        return not before

    def _log(self, text: str) -> None:
        append(self._job.out / "failures.log", f"{now()}\n{text}\n")

    def _tell(self) -> None:
        counts = self._store.counts()
        finished = counts["done"] + counts["failed"] + counts["blocked"]
        self._listener.update(finished + sum(self._fractions.values()), counts["cases"], counts["failed"])
        if self._utility:
            self._listener.utility(sum(self._utility.values()), len(self._utility))

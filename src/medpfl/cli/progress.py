"""How an audit comes along, on stderr: a bar in a terminal, now and then a line in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from medpfl.cli.texts import duration

LINES_EVERY = 60.0
"""Seconds between two lines in a log."""


class Display(Protocol):
    """Shows progress from the first update on, so that an audit that is refused at once shows none."""

    def update(self, done: float, total: int, failed: int) -> None:
        """`done` of `total` cases are finished, running ones counted by their fraction; `failed` failed so far."""

    def training(self, model: str, fraction: float) -> None:
        """A model is being trained before its cases can be computed; 1 is the end."""

    def utility(self, done: float, total: int) -> None:
        """`done` of `total` federations are trained to measure utility, running ones counted by their fraction."""

    def close(self) -> None:
        """Shows how far it came."""


@contextmanager
def progress(console: Console) -> Iterator[Display]:
    """A display that fits the console and is closed at the end, whatever happens."""
    display: Display = Bar(console) if console.is_terminal else Lines(lambda text: console.print(text, soft_wrap=True))
    try:
        yield display
    finally:
        display.close()


class Bar:
    """A bar with the cases, the time left and the failures so far."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[cases]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("auditing", total=None, cases="")
        self._federations: TaskID | None = None

    def update(self, done: float, total: int, failed: int) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=done, total=max(total, 1), cases=_cases(done, total, failed))
        self._progress.start()

    def training(self, model: str, fraction: float) -> None:
        """Says so in front of the bar."""
        text = f"training {escape(model)} {fraction:.0%}" if fraction < 1 else "auditing"
        self._progress.update(self._task, description=text)

    def utility(self, done: float, total: int) -> None:
        """A bar of its own."""
        if self._federations is None:
            self._federations = self._progress.add_task("utility", total=total, cases="")
        self._progress.update(self._federations, completed=done, total=total, cases=_federations(done, total))
        self._progress.start()

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._progress.stop()


class Lines:
    """One line at the start, at most one a minute, and one at the end.

    >>> lines = Lines(print)
    >>> lines.update(0, 8, 0)
    auditing: 0/8 cases, 0 s
    >>> lines.update(4, 8, 1)
    >>> lines.close()
    auditing: 4/8 cases, 1 failed, 0 s, about 0 s left
    """

    def __init__(
        self, write: Callable[[str], object], every: float = LINES_EVERY, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._every = every
        self._clock = clock
        self._begun: tuple[float, float] | None = None  # time and cases done at the first update
        self._latest = (0.0, 0, 0)
        self._written = 0.0
        self._shown: tuple[float, int, int] | None = None
        self._trained: tuple[float, float] | None = None  # time and federations trained at the first update
        self._told_at, self._told = 0.0, False

    def update(self, done: float, total: int, failed: int) -> None:
        """Writes a line if it is time for one."""
        self._latest = (done, total, failed)
        if self._begun is None:
            self._begun = (self._clock(), done)
        elif self._clock() - self._written < self._every:
            return
        self._line()

    def training(self, model: str, fraction: float) -> None:
        """Writes a line if it is time for one."""
        if fraction < 1 and self._clock() - self._written >= self._every:
            self._written = self._clock()
            self._write(f"training {model}: {fraction:.0%}")

    def utility(self, done: float, total: int) -> None:
        """Writes a line when the first one comes along, if it is time for one, and when all are trained."""
        if done <= 0 or self._told:
            return
        if self._trained is None:
            self._trained = (self._clock(), done)
        elif done < total and self._clock() - self._told_at < self._every:
            return
        begun, first = self._trained
        self._told_at, self._told = self._clock(), done >= total
        elapsed, gained = self._told_at - begun, done - first
        left = f", about {duration(elapsed / gained * (total - done))} left" if gained > 0 and done < total else ""
        self._write(f"utility: {_federations(done, total)}, {duration(elapsed)}{left}")

    def close(self) -> None:
        """Writes the last line, unless it would repeat the one before."""
        if self._begun is not None and self._latest != self._shown:
            self._line()

    def _line(self) -> None:
        assert self._begun is not None  # both callers see to that
        self._written, self._shown = self._clock(), self._latest
        done, total, failed = self._latest
        elapsed, gained = self._written - self._begun[0], done - self._begun[1]
        left = f", about {duration(elapsed / gained * (total - done))} left" if gained > 0 and done < total else ""
        self._write(f"auditing: {_cases(done, total, failed)}, {duration(elapsed)}{left}")


def _cases(done: float, total: int, failed: int) -> str:
    return f"{int(done)}/{total} cases" + (f", {failed} failed" if failed else "")


def _federations(done: float, total: int) -> str:
    return f"{int(done)}/{total} federations"

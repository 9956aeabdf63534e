"""Snapshots of running chunks, and progress to whoever started them."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import torch

from medpfl.core.files import write_atomically
from medpfl.core.seeding import content_hash
from medpfl.core.session import Session, State
from medpfl.models.state import TORCH_ERRORS

INTERVAL = 20.0
"""Seconds between two snapshots of a chunk; at most this much work is lost, plus one solver step."""


class FileSession:
    """A `Session` that keeps its snapshot in one file and reports fractions of the work."""

    def __init__(self, folder: Path, chunk: str, report: Callable[[float], object], interval: float = INTERVAL) -> None:
        self.path = folder / f"{content_hash(chunk)}.pt"
        self._report = report
        self._interval = interval
        self._saved = time.monotonic()
        self._reported = 0.0

    def restore(self) -> State | None:
        """The last snapshot, None if there is none or it cannot be read."""
        try:
            state: State = torch.load(self.path, map_location="cpu", weights_only=True)
        except (*TORCH_ERRORS, pickle.UnpicklingError):
            return None
        return state

    def checkpoint(self, done: int, total: int, state: Callable[[], State]) -> None:
        """Saves every `INTERVAL` seconds, reports twice a second."""
        moment = time.monotonic()
        if moment - self._reported > 0.5:
            self._reported = moment
            self._report(done / max(total, 1))
        if moment - self._saved > self._interval:
            import io

            buffer = io.BytesIO()
            torch.save(state(), buffer)
            write_atomically(self.path, buffer.getvalue())
            self._saved = time.monotonic()

    def close(self) -> None:
        """Removes the snapshot: the chunk's results are stored."""
        with contextlib.suppress(OSError):  # one that stays is never read again
            self.path.unlink()


class Watched:
    """A session that shows every state to somebody before it goes on."""

    def __init__(self, session: Session, watch: Callable[[int, Callable[[], State]], object]) -> None:
        self._session = session
        self._watch = watch

    def restore(self) -> State | None:
        """What the session restores."""
        return self._session.restore()

    def checkpoint(self, done: int, total: int, state: Callable[[], State]) -> None:
        """Shows the state, then does what the session does."""
        self._watch(done, state)
        self._session.checkpoint(done, total, state)

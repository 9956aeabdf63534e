"""What a long computation needs from whoever runs it: progress and snapshots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

State = dict[str, Any]
"""Nested dicts and lists of tensors, numbers, strings, booleans and None: everything needed to go on bit by bit."""


class Session(Protocol):
    """Given to every long-running solver. All methods are cheap to call in every iteration."""

    def restore(self) -> State | None:
        """The last snapshot of this computation, or None at a fresh start."""

    def checkpoint(self, done: int, total: int, state: Callable[[], State]) -> None:
        """Reports progress (`done` of `total` steps) and saves `state()` if the last snapshot is old enough."""


class NoSession:
    """Keeps nothing and reports nothing."""

    def restore(self) -> State | None:
        """Always a fresh start."""
        return None

    def checkpoint(self, done: int, total: int, state: Callable[[], State]) -> None:
        """Does nothing."""


NO_SESSION = NoSession()

"""Several searches one after the other within one session: what is finished is kept in every later snapshot."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from medpfl.attacks.matching.engine import Found
from medpfl.core.session import Session, State


class Parts:
    """Runs searches in a fixed order; after a restore, finished ones are not run again and the last one goes on.

    generators: of all searches; their states are part of every snapshot.
    """

    def __init__(self, session: Session, count: int, generators: Sequence[torch.Generator]) -> None:
        saved = session.restore() if count > 1 else None
        if saved is not None:
            for generator, state in zip(generators, saved["generators"], strict=True):
                generator.set_state(state)
        self._generators = generators
        self._session = session
        self._count = count
        self._finished: list[State] = list(saved["finished"]) if saved is not None else []
        self._inner: State | None = saved["inner"] if saved is not None else None
        self._next = 0

    def run(self, search: Callable[[Session], list[Found]]) -> list[Found]:
        """The next search's result; a single search has the session for itself."""
        if self._count == 1:
            return search(self._session)
        if self._next == len(self._finished):
            found = search(self)
            self._finished.append({"found": [vars(one) for one in found]})
            self._inner = None
        plain = self._finished[self._next]["found"]
        self._next += 1
        return [
            Found(**{**one, "trace": tuple((int(at), float(value)) for at, value in one["trace"])}) for one in plain
        ]

    def restore(self) -> State | None:
        """The running search's own snapshot."""
        return self._inner

    def checkpoint(self, done: int, total: int, state: Callable[[], State]) -> None:
        """Progress over all searches, each taken to be as long as the running one."""
        self._session.checkpoint(
            self._next * total + done,
            self._count * total,
            lambda: {
                "finished": list(self._finished),
                "inner": state(),
                "generators": [generator.get_state() for generator in self._generators],
            },
        )

"""Recording behind a training's back: nobody waits for a disk while clients train."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Behind:
    """Does what it is told in order, on a thread of its own; a process that ends waits for it.

    Whoever hands over work keeps what it reads unchanged until it is done. Call `wait` once per round, so that no more
    than one round is ever under way, and memory holds no more than one round's updates.

    >>> behind, done = Behind(), []
    >>> behind.do(lambda: done.append("written"))
    >>> behind.wait()
    >>> done
    ['written']
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="medpfl-recording")
        self._open: list[Future[None]] = []

    def do(self, act: Callable[[], None]) -> None:
        """Returns at once. What `act` raises is raised by the next `wait`."""
        self._open.append(self._thread.submit(act))

    def wait(self) -> None:
        """Until all is done."""
        while self._open:
            self._open.pop(0).result()

    def close(self) -> None:
        """Until all is done, and its thread has ended: nothing can be told after."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

"""Writing files so that a reader never sees half of one and other users never see any."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from medpfl.core.errors import StoreError

WAY_ON = "mend the cause and run the same command again"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a private file (mode 0600) by renaming a complete one into place. Raises StoreError.

    Folders are created with mode 0700.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(temporary, "wb", opener=_private) as handle:
            handle.write(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise unwritable(path, error) from None


def append(path: Path, text: str) -> None:
    """Adds text to a private file (mode 0600). Raises StoreError."""
    try:
        with open(path, "a", encoding="utf-8", opener=_private) as handle:
            handle.write(text)
    except OSError as error:
        raise unwritable(path, error) from None


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Holds a lock that ends with this process at the latest, on a private file (mode 0600) that stays.

    Raises BlockingIOError if another process holds it and `wait` is false, OSError where the file cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # no advisory locks on this platform
        yield
        return
    with open(path, "w", opener=_private) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def unwritable(path: Path, error: OSError) -> StoreError:
    """What to raise where a file of an output folder cannot be written: full disk, no permission, a folder in the way."""
    return StoreError(
        f"{path}: cannot be written ({error.strerror or error}); nothing that was finished is lost: {WAY_ON}"
    )

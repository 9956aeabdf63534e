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

    Missing folders are created with mode 0700.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        make_private_folder(path.parent)
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
    make_private(path)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def make_private_folder(folder: Path) -> None:
    """Creates a folder and all that are missing above it with mode 0700; leaves those that are there. Raises OSError."""
    if not folder.is_dir():
        make_private_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def make_private(path: Path) -> None:
    """Lets only the owner read and write the file; creates it if it is not there. Raises OSError."""
    with open(path, "ab", opener=_private):
        path.chmod(0o600)


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def unwritable(path: Path, error: OSError) -> StoreError:
    """What to raise where a file of an output folder cannot be written: full disk, no permission, a folder in the way."""
    return StoreError(
        f"{path}: cannot be written ({error.strerror or error}); nothing that was finished is lost: {WAY_ON}"
    )

"""Writing files so that a reader never sees half of one and other users never see any."""

from __future__ import annotations

import contextlib
import os
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
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as handle:
            handle.write(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise unwritable(path, error) from None


def append(path: Path, text: str) -> None:
    """Adds text to a private file (mode 0600). Raises StoreError."""
    try:
        with open(path, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as handle:
            handle.write(text)
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> StoreError:
    """What to raise where a file of an output folder cannot be written: full disk, no permission, a folder in the way."""
    return StoreError(
        f"{path}: cannot be written ({error.strerror or error}); nothing that was finished is lost: {WAY_ON}"
    )

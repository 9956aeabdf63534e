"""Writing files so that a reader never sees half of one and other users never see any."""

from __future__ import annotations

import os
from pathlib import Path

from medpfl.core.errors import StoreError


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
        temporary.unlink(missing_ok=True)
        raise StoreError(
            f"{path}: cannot be written ({error.strerror}); nothing that was finished is lost: "
            "mend the cause and run the same command again"
        ) from None

"""Where a recording lies: a private folder, encrypted or not, or this process' memory only."""

from __future__ import annotations

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medpfl.core.errors import DataError, MissingExtra, StoreError
from medpfl.core.files import append, locked, make_private_folder, unwritable, write_atomically

LOG = "log.jsonl"
"""Name of the log within a recording's folder."""

PAUSE = 0.02
"""Seconds between two looks at a folder in which another recorder writes."""

NONCE = 12
"""Bytes of the random number in front of every encrypted file."""


class Storage(ABC):
    """A log that only grows, and files that are written once."""

    @abstractmethod
    def lock(self, patience: float = 0.0) -> contextlib.AbstractContextManager[None]:
        """Held by the one who writes. Raises StoreError where somebody else still does after `patience` seconds."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Keeps a file, whole or not at all. Raises StoreError."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A file's content. Raises DataError where it is not there or cannot be read."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether a file of that name was written."""

    @abstractmethod
    def append(self, line: str) -> None:
        """Adds a line to the log. Raises StoreError."""

    @abstractmethod
    def lines(self) -> list[str]:
        """The log's lines, the last one perhaps cut off. Raises DataError where there is no log."""

    @abstractmethod
    def size(self) -> int:
        """Bytes of all files."""


class MemoryStorage(Storage):
    """Nothing touches the disk; the recording ends with the process."""

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}
        self._lines: list[str] = []

    def lock(self, patience: float = 0.0) -> contextlib.AbstractContextManager[None]:
        """Always free: nobody else can reach it."""
        return contextlib.nullcontext()

    def write(self, name: str, content: bytes) -> None:
        """Keeps a copy."""
        self._files[name] = bytes(content)

    def read(self, name: str) -> bytes:
        """What was written under that name."""
        if name not in self._files:
            raise DataError(f"the recording in memory has no file '{name}'")
        return self._files[name]

    def has(self, name: str) -> bool:
        """Whether it was written."""
        return name in self._files

    def append(self, line: str) -> None:
        """One line more."""
        self._lines.append(line)

    def lines(self) -> list[str]:
        """All lines."""
        return list(self._lines)

    def size(self) -> int:
        """Bytes of all files."""
        return sum(len(content) for content in self._files.values())


class FolderStorage(Storage):
    """A folder with mode 0700; with a `key` (32 bytes) files and log lines are encrypted with AES-256-GCM.

    The key is the user's to keep; without it nobody reads the recording. Needs `medpfl[encryption]` then.
    """

    def __init__(self, folder: Path, key: bytes | None = None) -> None:
        self.folder = Path(folder)
        self._cipher = None if key is None else _cipher(key)
        self._torn = False

    @contextlib.contextmanager
    def lock(self, patience: float = 0.0) -> Iterator[None]:
        """A lock that ends with this process at the latest."""
        try:
            make_private_folder(self.folder)
            self._refuse_other_content()
        except OSError as error:
            raise unwritable(self.folder, error) from None
        with contextlib.ExitStack() as held:
            self._hold(held, time.monotonic() + patience)
            self._end_last_line()
            yield

    def _hold(self, held: contextlib.ExitStack, until: float) -> None:
        while True:
            try:
                held.enter_context(locked(self.folder / ".lock", wait=False))
                return
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise StoreError(
                        f"{self.folder}: another recorder writes there; give every recorder a folder of its own"
                    ) from None
                time.sleep(PAUSE)
            except OSError as error:
                raise unwritable(self.folder, error) from None

    def write(self, name: str, content: bytes) -> None:
        """A private file that appears whole and is on the disk before the log names it."""
        path = self.folder / name
        write_atomically(path, self._sealed(content, name))
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.fsync(file.fileno())

    def read(self, name: str) -> bytes:
        """The file, decrypted."""
        try:
            content = (self.folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"{self.folder / name}: cannot be read ({error.strerror or error})") from None
        return self._opened(content, name)

    def has(self, name: str) -> bool:
        """Whether it lies there; names that lead out of the folder do not."""
        return Path(name).name == name and (self.folder / name).is_file()

    def append(self, line: str) -> None:
        """One line more, on the disk when this returns."""
        if self._cipher is not None:
            line = self._sealed(line.encode(), LOG).hex() + "\n"
        if self._torn:
            self._end_last_line()
        self._torn = True  # until the whole line is there: a disk may be full in the middle of it
        append(self.folder / LOG, line)
        self._torn = False
        with contextlib.suppress(OSError), (self.folder / LOG).open("rb") as file:
            os.fsync(file.fileno())

    def lines(self) -> list[str]:
        """The log's lines, decrypted; a last line that was cut off is given as it is."""
        path = self.folder / LOG
        try:
            found = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        except OSError as error:
            raise DataError(
                f"{self.folder}: is no recording ({LOG}: {error.strerror or error}); name the folder that a recorder wrote"
            ) from None
        if found and not found[0].startswith("{") and self._cipher is None:
            raise DataError(f"{self.folder}: the recording is encrypted; give its key")
        if self._cipher is None:
            return found
        return self._opened_lines(found)

    def size(self) -> int:
        """Bytes of all files, as they lie on the disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())

    def _refuse_other_content(self) -> None:
        others = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]
        if others and LOG not in others:
            raise StoreError(
                f"{self.folder}: the folder is not empty and holds no recording ({min(others)}); choose an empty one"
            )

    def _end_last_line(self) -> None:
        """A line that was cut off ends here, so that the next one starts anew."""
        path = self.folder / LOG
        if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            append(path, "\n")

    def _sealed(self, content: bytes, name: str) -> bytes:
        if self._cipher is None:
            return content
        nonce = os.urandom(NONCE)
        sealed: bytes = nonce + self._cipher.encrypt(nonce, content, name.encode())
        return sealed

    def _opened(self, content: bytes, name: str) -> bytes:
        if self._cipher is None:
            return content
        from cryptography.exceptions import InvalidTag

        try:
            opened: bytes = self._cipher.decrypt(content[:NONCE], content[NONCE:], name.encode())
        except (InvalidTag, ValueError):
            raise DataError(
                f"{self.folder / name}: cannot be decrypted with this key, or was changed; give the key that it was "
                "recorded with"
            ) from None
        return opened

    def _opened_lines(self, lines: list[str]) -> list[str]:
        """Decrypted as far as they can be; others stay as they are. Raises DataError where none can."""
        opened, wrong = [], None
        for line in lines:
            try:
                opened.append(self._opened(bytes.fromhex(line.strip()), LOG).decode() if line.strip() else line)
            except DataError as error:
                opened, wrong = [*opened, line], wrong or error
            except ValueError:  # no hexadecimal digits any more
                opened.append(line)
        if wrong is not None and not any(line.startswith("{") for line in opened):
            raise wrong
        return opened


def _cipher(key: bytes) -> Any:
    if len(key) != 32:
        raise StoreError(f"the key of a recording has 32 bytes, found {len(key)}; make one with os.urandom(32)")
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise MissingExtra(
            "an encrypted recording needs the package cryptography: pip install 'medpfl[encryption]'"
        ) from None
    return AESGCM(key)

"""Finding files: sorted, without hidden ones, with the class that their first sub-folder names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from medpfl.core.errors import DataError
from medpfl.data.base import UNLABELED
from medpfl.data.paths import require_access, require_path


@dataclass(frozen=True)
class Found:
    """A file with its name relative to the folder that was read, written with slashes."""

    path: Path
    name: str

    @property
    def folder(self) -> str | None:
        """The first sub-folder, None for a file that lies directly in the folder that was read."""
        first, slash, _ = self.name.partition("/")
        return first if slash else None


def find_files(
    root: Path,
    *,
    suffixes: Sequence[str] = (),
    pattern: str = "*",
    names: Sequence[str] = (),
    without: Path | None = None,
) -> list[Found]:
    """Files under `root`, or `root` itself where it is a file, sorted by name.

    Hidden files and folders are left out. `suffixes` (lower case; empty for all) and `pattern` (matched against the
    file name, or against the relative name if it has a slash) choose among them; `names` lists them instead. Files
    below `without`, a folder in `root`, are left out. Raises DataError if `root` or a listed file does not exist or nothing is left.
    """
    require_access(root)
    if root.is_file():
        return [Found(root, root.name)]
    if names:
        return [Found(require_access(root / name), Path(name).as_posix()) for name in names]
    everything = [Found(root / name, name) for name in sorted(_walk(root), key=lambda name: name.split("/"))]
    if without is not None:
        everything = [file for file in everything if without not in file.path.parents]
    found = [file for file in everything if _admitted(file, suffixes, pattern)]
    if not found:
        wanted = " ".join(suffixes) if pattern == "*" else f"'{pattern}'"
        raise DataError(
            f"'{root}' holds no {wanted or 'file'} file among its {len(everything)} files; point at the images"
            if everything
            else f"'{require_path(root)}' is empty; point at a folder with images"
        )
    return found


def classes_of(found: Sequence[Found], *, labels: str = "folder", root: Path) -> tuple[tuple[str, ...], list[int]]:
    """Class names, sorted, and one label per file, from first sub-folders; one class "unlabeled" without any.

    Raises DataError if some files lie in sub-folders and some beside them.
    """
    folders = [file.folder if labels == "folder" else None for file in found]
    names = sorted({name for name in folders if name is not None})
    if not names:
        return (UNLABELED,), [0] * len(found)
    if None in folders:
        stray = next(file.name for file in found if file.folder is None)
        raise DataError(
            f"'{root}' has images in sub-folders and beside them ('{stray}'); "
            "expected one sub-folder per class, or a flat folder"
        )
    return tuple(names), [names.index(name) for name in folders if name is not None]


def _admitted(file: Found, suffixes: Sequence[str], pattern: str) -> bool:
    if suffixes and not file.name.lower().endswith(tuple(suffixes)):
        return False
    return fnmatchcase(file.name if "/" in pattern else file.path.name, pattern)


def _walk(root: Path) -> list[str]:
    """Names of all files that are not hidden, relative to `root`; follows links to folders, once each."""
    names: list[str] = []
    visited: set[str] = set()

    def refuse(error: OSError) -> None:
        raise DataError(f"'{error.filename}' cannot be read: {error.strerror}; check its permissions") from None

    for folder, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(folder).relative_to(root)
        names += [(relative / name).as_posix() for name in files if not name.startswith(".")]
    return names

"""Where data lies: beside the spec, in the home folder, or inside an installed package."""

from __future__ import annotations

import difflib
import importlib.util
import os
from pathlib import Path, PurePosixPath

from medpfl.core.errors import DataError

PACKAGE_PREFIX = "package:"


def resolve_path(text: str, base: Path) -> Path:
    """The existing file or folder that a spec names.

    Relative paths start at `base`, the folder of the spec; `~` is the home folder; `package:nibabel/tests/data` is
    a file or folder inside an installed package, found without importing it. Raises DataError with the nearest
    existing name if there is no such thing.
    """
    if text.startswith(PACKAGE_PREFIX):
        return require_path(_package_path(text), shown=text)
    try:
        path = base / Path(text).expanduser()
    except RuntimeError:
        raise DataError(f"path '{text}': there is no such home folder; write the path out in full") from None
    return require_path(Path(os.path.normpath(path)), shown=text)


def require_path(path: Path, shown: str | None = None) -> Path:
    """`path` if it exists, else DataError with the nearest existing name beside it."""
    try:
        found = path.exists()
    except (OSError, ValueError):  # a name that is too long, holds a null byte or lies behind a closed folder
        found = False
    if found:
        return path
    text = str(path) if shown is None else shown
    raise DataError(f"path '{text}' does not exist{_nearest(path)}")


def require_access(path: Path) -> Path:
    """`path` if it exists and may be read, else DataError."""
    require_path(path)
    if not os.access(path, os.R_OK):
        raise DataError(f"'{path}' cannot be read: no permission; check who owns it")
    return path


def require_file(path: Path, kind: str) -> Path:
    """`path` if it is a file that may be read, else DataError that says which `kind` of file is expected."""
    if require_access(path).is_dir():
        raise DataError(f"'{path}' is a folder; give the path of one {kind} file")
    return path


def _package_path(text: str) -> Path:
    parts = PurePosixPath(text.removeprefix(PACKAGE_PREFIX)).parts
    if not parts or ".." in parts or not parts[0].isidentifier():
        raise DataError(f"path '{text}': expected package:NAME/folder/file, for instance package:nibabel/tests/data")
    package, *rest = parts
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise DataError(f"path '{text}': no package '{package}' with files is installed; pip install {package}")
    candidates = [Path(folder).joinpath(*rest) for folder in folders]
    return next((path for path in candidates if path.exists()), candidates[0])


def _nearest(path: Path) -> str:
    """The end of the message: the nearest existing name at the deepest existing level of the path."""
    missing = path
    try:
        while missing != missing.parent and not missing.parent.is_dir():
            missing = missing.parent
        names = sorted(entry.name for entry in missing.parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        return "; check the spelling"
    by_lower = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(missing.name.lower(), by_lower, n=1, cutoff=0.5)
    if near:
        return f": did you mean '{missing.parent / by_lower[near[0]]}'?"
    return f": '{missing.parent}' has no '{missing.name}'; check the spelling and where the spec lies"

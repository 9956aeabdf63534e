"""Anybody's own code by name: `package.module:callable`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medpfl.core.errors import ModelError
from medpfl.models.probe import summary_of


@contextmanager
def searched_first(folders: Sequence[Path]) -> Iterator[None]:
    """Inside, packages are looked for in these folders before the installed ones."""
    before = list(sys.path)
    sys.path[:0] = [str(Path(folder).resolve()) for folder in folders]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def imported(name: str, search_path: Sequence[Path]) -> Callable[..., Any]:
    """What `package.module:callable` names. Raises ModelError that says what is missing.

    search_path: the folders that are searched first, for the message; see `searched_first`.
    """
    package, _, attribute = name.partition(":")
    if not package or not attribute:
        raise ModelError(f"factory '{name}' is not of the form package.module:callable")
    try:
        found: Any = importlib.import_module(package)
    except ModuleNotFoundError as error:
        places = ", ".join([*(f"'{folder}'" for folder in search_path), "the installed packages"])
        raise ModelError(f"factory '{name}': found no module '{error.name}' in {places}") from error
    except (Exception, SystemExit) as error:  # importing a user's module may raise anything
        raise ModelError(f"factory '{name}' cannot be imported: {summary_of(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ModelError(f"factory '{name}': module '{package}' has no '{attribute}'")
        found = getattr(found, part)
    if not callable(found):
        raise ModelError(
            f"factory '{name}' is {type(found).__name__}, which cannot be called: name a function or class"
        )
    result: Callable[..., Any] = found
    return result

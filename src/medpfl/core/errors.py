"""The one exception tree.

Everything that a user can cause derives from `InputError` and is shown as one message without a traceback
(exit code 2). Everything an attack can do wrong at run time derives from `AttackFailure` and fails its case only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MedPFLError(Exception):
    """Base of all errors that MedPFL raises on purpose."""


class InputError(MedPFLError):
    """Something that the user gave is wrong: the message says where, what was found, what was expected, a way out."""


class SpecError(InputError):
    """The audit spec is wrong."""


class DataError(InputError):
    """A data file or folder cannot be used."""


class ModelError(InputError):
    """A model, model factory or checkpoint cannot be used."""


class StoreError(InputError):
    """The output folder cannot be used."""


class MissingExtra(InputError):
    """An optional dependency is not installed."""


class Refused(MedPFLError):
    """This combination is not possible, with the reason: the cell is listed as refused and the others run."""


class AttackFailure(MedPFLError):
    """An attack broke down on a case; the case fails, the others finish."""


class Interrupted(MedPFLError):
    """The run was stopped by the user and can be resumed."""


def suggestion(found: str, known: Iterable[str]) -> str:
    """Ends an error message with the nearest known word, or with the list of known words.

    >>> suggestion("dgl", ["dlg", "cpl"])
    "did you mean 'dlg'? Known: cpl, dlg"
    """
    names = sorted(known)
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}Known: {', '.join(names)}" if names else hint

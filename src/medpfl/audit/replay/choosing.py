"""Which recordings, rounds and clients are replayed, and which settings belong to which recording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from medpfl.core.errors import DataError, SpecError
from medpfl.federation.recording import Recorded, Recording

TRUTH_SUFFIX = "-truth"
"""`NAME-truth` holds the ground truth of the recording NAME, where several share a folder."""


def recording_names(folders: Sequence[Path]) -> tuple[str, ...]:
    """One name for each recording: its folder's, or its parent's before it where two are called alike.

    >>> recording_names([Path("/a/plain"), Path("/a/noise")])
    ('plain', 'noise')
    >>> recording_names([Path("/a/recording"), Path("/b/recording")])
    ('a-recording', 'b-recording')
    """
    whole = [folder.resolve() for folder in folders]
    short = [_letters(folder.name) for folder in whole]
    found = tuple(
        name if short.count(name) == 1 else f"{_letters(folder.parent.name)}-{name}"
        for name, folder in zip(short, whole, strict=True)
    )
    if twice := [name for name in found if found.count(name) > 1]:
        raise SpecError(f"two recordings would be called '{twice[0]}': name each once, or rename their folders")
    return found


def by_recording(values: Sequence[str], names: Sequence[str], option: str) -> Mapping[str, str]:
    """What `[NAME=]VALUE` says of each recording; a value without a name is for those that none is named for.

    >>> by_recording(["a=1", "2"], ["a", "b", "c"], "--recipe")
    {'a': '1', 'b': '2', 'c': '2'}
    """
    named: dict[str, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        key, text = (name, rest) if equals and name in names else ("", value)
        if key in named:
            raise SpecError(f"{option}: given twice{f' for {key}' if key else ''}; write NAME=VALUE with a recording's name "
                            f"({', '.join(names)})")  # fmt: skip
        named[key] = text
    return {name: found for name in names if (found := named.get(name, named.get(""))) is not None}


def truth_folders(values: Sequence[str], names: Sequence[str]) -> Mapping[str, Path]:
    """The folder with the truth of each recording.

    A folder that holds `NAME-truth` stands for it; one that holds files itself is taken as it is. Recordings that the
    folder of all others has nothing of are left without a truth.
    """
    found: dict[str, Path] = {}
    for name, text in by_recording(values, names, "--truth").items():
        folder = Path(text)
        beside = folder / f"{name}{TRUTH_SUFFIX}"
        if beside.is_dir():
            found[name] = beside
        elif not any((folder / f"{other}{TRUTH_SUFFIX}").is_dir() for other in names):
            found[name] = folder
    return found


def chosen_updates(
    name: str, recording: Recording, rounds: Sequence[int], clients: Sequence[str]
) -> tuple[Recorded, ...]:
    """The updates of these rounds and clients, all where none is named. Raises DataError where there is no such one."""
    for wanted in rounds:
        if wanted not in recording.rounds:
            known = _told(recording.rounds)
            raise DataError(
                f"--round {wanted}: no update of that round was recorded in '{name}'; there are rounds {known}"
            )
    everybody = sorted({one.client for one in recording.updates})
    for client in clients:
        if client not in everybody:
            raise DataError(
                f"--client {client}: nothing of that client was recorded in '{name}'; there are {', '.join(everybody)}"
            )
    chosen = tuple(
        one
        for one in recording.updates
        if (not rounds or one.round in rounds) and (not clients or one.client in clients)
    )
    if not chosen:
        problems = f" ({recording.problems[0]})" if recording.problems else ""
        raise DataError(f"recording '{name}' holds no update{problems}: nothing can be replayed")
    return chosen


def _letters(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)


def _told(rounds: Sequence[int]) -> str:
    """At most a dozen numbers.

    >>> _told([1, 2, 3]), _told(range(100))
    ('1, 2, 3', '0 to 99')
    """
    if len(rounds) > 12:
        return f"{rounds[0]} to {rounds[-1]}"
    return ", ".join(map(str, rounds)) or "none"

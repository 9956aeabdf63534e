"""Texts for a terminal: names from an output folder, durations."""

from __future__ import annotations

from rich.console import Console


def wide_console() -> Console:
    """Standard output; a pipe or a log has no width of its own and gets a wide one."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def printable(text: str) -> str:
    """The text with every control character as a question mark, so that a name cannot steer the terminal.

    >>> printable("a" + chr(27) + "[31mb")
    'a?[31mb'
    """
    return "".join(character if character.isprintable() else "?" for character in text)


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use.

    >>> duration(12.3), duration(600), duration(7200)
    ('12 s', '10 min', '2.0 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

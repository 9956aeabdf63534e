"""Texts of an output folder, made fit for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with every control character as a question mark, so that a name cannot steer the terminal.

    >>> printable("a" + chr(27) + "[31mb")
    'a?[31mb'
    """
    return "".join(character if character.isprintable() else "?" for character in text)

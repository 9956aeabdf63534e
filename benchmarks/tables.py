"""Rows that benchmarks measure, kept as CSV, and the tables of the pages that are made from them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R")

KINDS = {"int": int, "float": float, "str": str}


def read_rows(path: Path, kind: type[R]) -> list[R]:
    """The rows (a dataclass of int, float, str, and `| None` of them) of an earlier run; none without the file."""
    if not path.exists():
        return []
    types = {one.name: str(one.type) for one in fields(kind)}  # type: ignore[arg-type]
    with path.open(newline="", encoding="utf-8") as file:
        return [kind(**{name: _value(types[name], text) for name, text in row.items()}) for row in csv.DictReader(file)]


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """All rows, of one dataclass, under its fields' names; nothing for None."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [one.name for one in fields(rows[0])])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_texts(path: Path) -> list[dict[str, str]]:
    """The rows of an earlier run as they were written; none without the file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_texts(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """All rows under these columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def add_texts(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Adds rows to those of earlier runs and returns the new ones as texts."""
    added = [{name: str(value) for name, value in row.items()} for row in rows]
    write_texts(path, columns, [*read_texts(path), *added])
    return added


def has_texts(path: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether an earlier run measured a row with these values."""
    return any(all(row[name] == str(value) for name, value in wanted.items()) for row in read_texts(path))


def markdown(head: Sequence[str], lines: Sequence[Sequence[object]]) -> list[str]:
    """A table in Markdown, None left empty.

    >>> markdown(["a", "b"], [[1, None]])
    ['| a | b |', '| --- | --- |', '| 1 |  |']
    """
    return [
        f"| {' | '.join('' if value is None else str(value) for value in line)} |"
        for line in (head, ["---"] * len(head), *lines)
    ]


def put(page: Path, name: str, lines: Sequence[str]) -> None:
    """Writes the lines into the page between `<!-- NAME -->` and `<!-- end of NAME -->`; all other text stays as it is.

    Ends the program where the page lacks the two marks.
    """
    text = page.read_text(encoding="utf-8")
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, begun, rest = text.partition(first)
    _, ended, after = rest.partition(last)
    if not begun or not ended:
        raise SystemExit(f"{page} has no place for {name}: a line {first.strip()} and, below it, a line {last}")
    page.write_text("\n".join([before + first, *lines, "", last]) + after, encoding="utf-8")


def _value(kind: str, text: str) -> object:
    return None if text == "" and kind.endswith("| None") else KINDS[kind.partition(" ")[0]](text)

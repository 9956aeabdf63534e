"""Rows of the table of runs, and the CSV that they are kept in."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One run.

    run: its id. kind: `honest`, `crafted` or `adaptive`. group: architecture, attack family, or trick. body: the
    architecture of the net. detail: what else was drawn. strength: how far a trick goes. structure, behavior, gate:
    verdicts with shipped thresholds. agreed, reference: what the agreed model and a reference say beside them.
    recovered: share of the client's images that the server reads above 30 dB. times: seconds of vetting and of the gate.
    scores: every check's score, `name=value;...`.
    """

    run: str
    kind: str
    group: str
    body: str
    detail: str
    strength: float
    data: str
    images: int
    structure: str
    behavior: str
    gate: str
    agreed: str
    reference: str
    recovered: float
    times: str
    scores: str

    @property
    def values(self) -> dict[str, float]:
        """The scores by name."""
        pairs = (pair.split("=") for pair in self.scores.split(";") if pair)
        return {name: float(value) for name, value in pairs}


COLUMNS = tuple(field.name for field in fields(Row))

NUMBERS = {"strength": float, "images": int, "recovered": float}


def read_rows(path: Path) -> list[Row]:
    """All rows; none if there is no file yet."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(**{name: NUMBERS.get(name, str)(text) for name, text in line.items()}) for line in csv.DictReader(file)
        ]


def add_row(path: Path, row: Row) -> None:
    """Adds one row, and the header to a new file."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))


def written(values: dict[str, float]) -> str:
    """Scores as text."""
    return ";".join(f"{name}={value:.4g}" for name, value in values.items())


def sorted_file(path: Path) -> Sequence[Any]:
    """Brings the rows into the order of their ids, whatever order they were measured in."""
    rows = sorted(read_rows(path), key=lambda row: (row.kind, row.run))
    path.unlink(missing_ok=True)
    for row in rows:
        add_row(path, row)
    return rows

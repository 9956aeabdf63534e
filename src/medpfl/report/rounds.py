"""Leakage over the rounds of a recorded training: which curves there are, and which rounds stand for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medpfl.report import settings
from medpfl.report.curves import MOST_LINES
from medpfl.report.views import Audit, Cell

MOST_SHOWN = 3
"""Rounds of which success curves are drawn: the first, the middle and the last."""


@dataclass(frozen=True)
class Course:
    """One attack over the rounds of one recording. `cells` has a place for every round, None where it was refused."""

    label: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class RoundPanel:
    """One recording, or a part of its attacks. `nulls` is the mean SSIM of the most similar other image by round."""

    dataset: str
    title: str
    rounds: tuple[int, ...]
    courses: tuple[Course, ...]
    nulls: tuple[float | None, ...]


def round_of(cell: Cell) -> int | None:
    """The round that a replayed cell is of; None for the cells of an audit."""
    number = cell.params.get("model", {}).get("round")
    return number if isinstance(number, int) else None


def round_panels(audit: Audit) -> tuple[RoundPanel, ...]:
    """A panel for each recording with more than one round whose images are known."""
    return tuple(panel for dataset in audit.datasets for panel in _panels(audit, dataset))


def few_rounds(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of the first, the middle and the last round; all cells where there are no more rounds, or none."""
    rounds = sorted({number for cell in cells if (number := round_of(cell)) is not None})
    if len(rounds) <= MOST_SHOWN:
        return list(cells)
    shown = {rounds[0], rounds[(len(rounds) - 1) // 2], rounds[-1]}
    return [cell for cell in cells if round_of(cell) in shown]


def _panels(audit: Audit, dataset: str) -> list[RoundPanel]:
    cells = [cell for cell in audit.cells if cell.dataset == dataset and cell.ssim.value is not None]
    rounds = tuple(sorted({number for cell in cells if (number := round_of(cell)) is not None}))
    if len(rounds) < 2:
        return []
    found: dict[str, dict[int | None, Cell]] = {}
    for cell in cells:
        found.setdefault(_label(cell), {})[round_of(cell)] = cell
    courses = [Course(label, tuple(own.get(number) for number in rounds)) for label, own in found.items()]
    nulls = tuple(_null(cells, number) for number in rounds)
    first = cells[0]
    title = f"{dataset}: {settings.defense(first)}, {settings.channel(first)}"
    parts = [courses[start : start + MOST_LINES] for start in range(0, len(courses), MOST_LINES)]
    return [
        RoundPanel(dataset, title if len(parts) == 1 else f"{title}, part {place}", rounds, tuple(part), nulls)
        for place, part in enumerate(parts, 1)
    ]


def _label(cell: Cell) -> str:
    return f"{cell.attack} (knows the defense)" if cell.adaptive else cell.attack


def _null(cells: Sequence[Cell], number: int) -> float | None:
    """All attacks of a round meet the same images, so any cell that has the baseline tells it."""
    own = (cell.nulls["nearest"].ssim for cell in cells if round_of(cell) == number and "nearest" in cell.nulls)
    return next((value for value in own if value is not None), None)

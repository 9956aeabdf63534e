"""The table of cells: which columns there are, what they say, and how they sort and filter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from medpfl.report import settings
from medpfl.report.columns import AXIS_TITLES, Column, Value, columns_of
from medpfl.report.formatting import DASH
from medpfl.report.views import AXES, Cell


@dataclass(frozen=True)
class Filter:
    """A choice above the table: the index of its column and the values that it offers."""

    title: str
    column: int
    values: tuple[str, ...]


@dataclass(frozen=True)
class CellTable:
    """The table, ready to be written out. `constant` are axes that are the same in all cells."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    filters: tuple[Filter, ...]
    constant: tuple[tuple[str, str], ...]


def cell_table(cells: Sequence[Cell], threshold: float) -> CellTable:
    """Columns, rows and filters for these cells."""
    columns = columns_of(cells, threshold)
    rows = tuple(tuple(column.value(cell) for column in columns) for cell in cells)
    filters = []
    for index, column in enumerate(columns):
        values = tuple(dict.fromkeys(row[index].text for row in rows))
        if not column.numeric and column.title in _FILTERED and len(values) > 1:
            filters.append(Filter(column.title, index, tuple(sorted(values))))
    constant = tuple(
        (AXIS_TITLES[axis], cells[0].axes.get(axis, "") or DASH)
        for axis in AXES
        if cells and len({cell.axes.get(axis, "") for cell in cells}) == 1
    )
    return CellTable(columns, rows, tuple(filters), constant)


_FILTERED = (*AXIS_TITLES.values(), "Status", "Oracle", "Knows defense")


def namer(cells: Sequence[Cell]) -> Callable[[Cell], str]:
    """Names cells for headings: attack and defense, with those parts of the setting in which cells differ."""
    axes = settings.varying_axes(cells)

    def name(cell: Cell) -> str:
        setting = ", ".join(cell.axes[axis] for axis in axes if cell.axes.get(axis))
        return f"{cell.attack}, {settings.defense(cell)}{f' ({setting})' if setting else ''}"

    return name

"""Success curves as data: which lines belong into which panel, and their values at every threshold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medpfl.metrics.statistics import success_curve
from medpfl.report import settings
from medpfl.report.views import NULLS, Cell, ImageResult

Floats = NDArray[np.float64]

THRESHOLDS: Floats = np.linspace(0.0, 1.0, 201)
"""SSIM thresholds at which curves are drawn."""

DECIBELS = (18.0, 25.0, 30.0, 40.0)
"""PSNR thresholds beside them: 18 dB is what some papers count as recovered, and other patients' pictures reach it."""

MOST_LINES = 8
"""Lines that can be told apart in one panel."""


@dataclass(frozen=True)
class Line:
    """The success rate of one cell at every threshold. `values` is aligned with `THRESHOLDS`, `decibels` with `DECIBELS`."""

    label: str
    values: Floats
    at: tuple[float, ...]
    decibels: tuple[float, ...] = ()


@dataclass(frozen=True)
class NullMark:
    """A null baseline: its whole curve if the rows hold its scores, else its one rate at the audit's threshold."""

    name: str
    values: Floats | None
    rate: float | None
    at: tuple[float | None, ...]
    decibels: tuple[float, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One small figure: cells that differ in attack and defense only."""

    title: str
    images: int
    lines: tuple[Line, ...]
    nulls: tuple[NullMark, ...]


def columns(threshold: float) -> tuple[float, ...]:
    """Thresholds that are written out beside the figure: fixed ones and the audit's own.

    >>> columns(0.9)
    (0.5, 0.7, 0.8, 0.9, 0.95)
    """
    return tuple(sorted({0.5, 0.7, 0.8, 0.9, 0.95, threshold}))


def panels(cells: Sequence[Cell], threshold: float) -> tuple[Panel, ...]:
    """Small multiples of one data set: a panel per setting; too many lines are split by attack, then into parts."""
    drawn = [cell for cell in cells if cell.results and not cell.refused and not cell.unscored]
    found: list[Panel] = []
    for group in _grouped(drawn, settings.setting_key):
        varying = settings.varying_axes(drawn)
        title = ", ".join(group[0].axes[axis] for axis in varying)
        parts = [group] if len(group) <= MOST_LINES else _grouped(group, lambda cell: (cell.attack,))
        for part in parts:
            for start in range(0, len(part), MOST_LINES):
                chunk = part[start : start + MOST_LINES]
                found.append(_panel(chunk, _title(title, part, chunk), threshold))
    return tuple(found)


def _panel(cells: Sequence[Cell], title: str, threshold: float) -> Panel:
    at = columns(threshold)
    one_attack = len({cell.attack for cell in cells}) == 1
    lines = tuple(
        Line(
            _label(cell, one_attack),
            _curve(_scores(cell.results), THRESHOLDS),
            tuple(_curve(_scores(cell.results), at)),
            tuple(_curve(_scores(cell.results, "psnr"), DECIBELS)),
        )
        for cell in cells
    )
    nulls = tuple(mark for null in NULLS if (mark := _null_mark(cells, null, at, threshold)) is not None)
    return Panel(title, max(len(cell.results) for cell in cells), lines, nulls)


def _null_mark(cells: Sequence[Cell], name: str, at: Sequence[float], threshold: float) -> NullMark | None:
    """The baseline of the cell that knows most images of it; all cells of a panel share victims."""
    for cell in sorted(cells, key=lambda cell: -len(cell.results)):
        scores = [result.null_ssim[name] for result in cell.results if name in result.null_ssim]
        if scores:
            values = np.asarray(scores, dtype=np.float64)
            decibels = np.asarray([result.null_psnr.get(name, np.nan) for result in cell.results], dtype=np.float64)
            return NullMark(
                name,
                _curve(values, THRESHOLDS),
                _curve(values, [threshold])[0],
                tuple(_curve(values, at)),
                tuple(_curve(decibels[~np.isnan(decibels)], DECIBELS)),
            )
        null = cell.nulls.get(name)
        if null is not None and null.asr is not None:
            return NullMark(name, None, null.asr, tuple(null.asr if value == threshold else None for value in at))
    return None


def _scores(results: Sequence[ImageResult], metric: Literal["ssim", "psnr"] = "ssim") -> Floats:
    """SSIM or PSNR of every private image; NaN where the case failed or a guard stopped it."""
    values = [getattr(result, metric) if result.finished else None for result in results]
    return np.asarray([np.nan if value is None else value for value in values], dtype=np.float64)


def _curve(values: Floats, at: Sequence[float] | Floats) -> Floats:
    return success_curve(values, np.asarray(at, dtype=np.float64))


def _label(cell: Cell, one_attack: bool) -> str:
    oracle = " (oracle)" if cell.oracle else ""
    return f"{settings.defense(cell)}{oracle}" if one_attack else f"{cell.attack}, {settings.defense(cell)}{oracle}"


def _title(setting: str, part: Sequence[Cell], chunk: Sequence[Cell]) -> str:
    words = [setting] if setting else []
    if len({cell.attack for cell in chunk}) == 1:
        words.insert(0, chunk[0].attack)
    if len(chunk) < len(part):
        words.append(f"part {list(part).index(chunk[0]) // MOST_LINES + 1}")
    return ", ".join(words) or "all attacks and defenses"


def _grouped(cells: Sequence[Cell], key: Callable[[Cell], tuple[str, ...]]) -> list[list[Cell]]:
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return list(groups.values())

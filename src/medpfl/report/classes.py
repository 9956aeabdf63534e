"""Whether an attack got through to the images of some classes only."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from medpfl.report.views import Cell

SMALLEST_CLASS = 2
"""A class with fewer finished images says nothing about its class."""


@dataclass(frozen=True)
class ClassContrast:
    """Classes whose every image stayed below the best null baseline, beside classes whose every image is above it.

    `covered` and `exposed` are labels; the medians are PSNR in dB over their images; `images` counts covered ones.
    """

    covered: tuple[str, ...]
    exposed: tuple[str, ...]
    images: int
    covered_psnr: float
    exposed_psnr: float


def class_contrast(cell: Cell) -> ClassContrast | None:
    """The contrast between classes in a cell; None unless both kinds of class are there."""
    null = cell.best_null
    if null is None or null.psnr is None:
        return None
    by_label: dict[str, list[float]] = {}
    for result in cell.results:
        if result.label and result.psnr is not None:
            by_label.setdefault(result.label, []).append(result.psnr)
    judged = {label: values for label, values in sorted(by_label.items()) if len(values) >= SMALLEST_CLASS}
    covered = {label: values for label, values in judged.items() if max(values) < null.psnr}
    exposed = {label: values for label, values in judged.items() if min(values) > null.psnr}
    if not covered or not exposed:
        return None
    below, above = ([value for values in part.values() for value in values] for part in (covered, exposed))
    return ClassContrast(tuple(covered), tuple(exposed), len(below), median(below), median(above))

"""The diagnosis of cells as the report knows it: what each change did to the attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medpfl.report.loading import number
from medpfl.report.views import Audit, Cell, ImageResult, Measured

ALL = "all"
"""The name of all changes together."""

PICTURED_VICTIMS = 3
"""Victims whose images are shown with and without what protects them: the first ones, not chosen ones."""


@dataclass(frozen=True)
class Effect:
    """What one change did: differences changed minus as it is, over the private images that both cells met."""

    change: str
    cell: Cell | None
    base: Cell
    status: str
    reason: str
    oracle: bool
    victims: int
    images: int
    success: Measured
    successes: tuple[int, int]
    psnr: Measured
    psnr_values: tuple[float | None, float | None]
    ssim: Measured

    @property
    def measured(self) -> bool:
        """Whether there is anything to compare."""
        return self.psnr.value is not None or self.images > 0

    @property
    def direction(self) -> int:
        """1 if the change clearly helped the attack, -1 if it clearly hampered it, 0 if neither can be told."""
        for found in (self.success, self.psnr):
            if found.low is not None and found.low > 0:
                return 1
            if found.high is not None and found.high < 0:
                return -1
        return 0


@dataclass(frozen=True)
class Diagnosis:
    """One cell with the effects of all changes. `key` is the effect that the verdict is about, if it is about one."""

    cell: Cell
    verdict: str
    key: Effect | None
    effects: tuple[Effect, ...]
    label_accuracy: float | None
    notes: tuple[tuple[str, int], ...]
    stop_reasons: tuple[tuple[str, int], ...]


def diagnoses(audit: Audit) -> tuple[Diagnosis, ...]:
    """One per diagnosed cell, in the order of the cells."""
    cells = {cell.id: cell for cell in (*audit.cells, *audit.sweep)}
    entries = {str(entry.get("cell")): entry for entry in audit.diagnosis}
    return tuple(_diagnosis(cell, entries[cell.id], cells) for cell in audit.cells if cell.id in entries)


def _diagnosis(cell: Cell, entry: Mapping[str, Any], cells: Mapping[str, Cell]) -> Diagnosis:
    effects = tuple(_effect(cell, part, cells) for part in entry.get("changes") or ())
    return Diagnosis(
        cell=cell,
        verdict=str(entry.get("verdict", "")),
        key=next((effect for effect in effects if effect.change == entry.get("limit")), None),
        effects=effects,
        label_accuracy=number(entry.get("label_accuracy")),
        notes=_texts(entry.get("notes")),
        stop_reasons=_texts(entry.get("stop_reasons")),
    )


def _effect(base: Cell, entry: Mapping[str, Any], cells: Mapping[str, Cell]) -> Effect:
    images = int(number(entry.get("images")) or 0)
    success, psnr, ssim = (entry.get(metric) or {} for metric in ("success", "psnr", "ssim"))
    before, after = (round((number(success.get(when)) or 0.0) * images) for when in ("before", "after"))
    return Effect(
        change=str(entry.get("change", "")),
        cell=cells.get(str(entry.get("cell"))),
        base=base,
        status=str(entry.get("status", "")),
        reason=str(entry.get("reason") or ""),
        oracle=bool(entry.get("oracle")),
        victims=int(number(entry.get("victims")) or 0),
        images=images,
        success=_difference(success),
        successes=(before, after),
        psnr=_difference(psnr),
        psnr_values=(number(psnr.get("before")), number(psnr.get("after"))),
        ssim=_difference(ssim),
    )


def _difference(entry: Mapping[str, Any]) -> Measured:
    return Measured(*(number(entry.get(part)) for part in ("difference", "low", "high")))


def _texts(entries: Any) -> tuple[tuple[str, int], ...]:
    return tuple((str(entry["text"]), int(entry["cases"])) for entry in entries or ())


def pictured(found: Diagnosis) -> tuple[tuple[ImageResult, ImageResult], ...]:
    """Rows of the same private image, as it is and without what protects it, for the first victims."""
    if found.key is None or found.key.cell is None:
        return ()
    others = {result.private_image: result for result in found.key.cell.results}
    pairs = [
        (result, others[result.private_image])
        for result in found.cell.results
        if result.position == 0 and result.private_image in others
    ]
    pairs.sort(key=lambda pair: (int(pair[0].seed or 0), int(pair[0].victim or 0)))
    return tuple(pairs[:PICTURED_VICTIMS])


def scale(found: Sequence[Diagnosis]) -> float:
    """Decibels to either side of zero that the bars of all cells need."""
    ends = [
        abs(end)
        for diagnosis in found
        for effect in diagnosis.effects
        for end in (effect.psnr.value, effect.psnr.low, effect.psnr.high)
        if end is not None
    ]
    return max([5.0, *ends])

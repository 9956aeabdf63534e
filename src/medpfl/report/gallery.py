"""Truth beside reconstruction for the best, median and worst victims, as data URIs within a budget."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medpfl.report.views import Cell, ImageResult

BUDGET = 20 * 2**20
"""Bytes of inlined images that one report holds at most."""

MOST_IMAGES = 8
"""Private images that are shown of one victim."""

ENLARGED = 160
"""Pixels to which smaller images are enlarged."""

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URI with the size at which it is shown, or the reason why it is not there."""

    uri: str = ""
    width: int = ENLARGED
    height: int = ENLARGED
    pixelated: bool = False
    missing: str = ""


@dataclass(frozen=True)
class Pair:
    """One private image and what came back for it, with the masks of a segmentation model.

    mask: the true one, None where there is none. mask_found: what the attack found, None where it was not searched.
    """

    result: ImageResult
    truth: Picture
    reconstruction: Picture
    mask: Picture | None = None
    mask_found: Picture | None = None


@dataclass(frozen=True)
class Exhibit:
    """One victim of a cell. `rank` says why it was chosen, `more` how many of its images are not shown."""

    rank: str
    results: tuple[ImageResult, ...]
    pairs: tuple[Pair, ...] = ()
    more: int = 0

    @property
    def victim(self) -> str:
        """Number of the victim."""
        return self.results[0].victim


@dataclass(frozen=True)
class CellExhibits:
    """What is shown of one cell. `number` is its place in the table of cells, from 1."""

    number: int
    cell: Cell
    exhibits: tuple[Exhibit, ...]


@dataclass(frozen=True)
class Gallery:
    """What is shown of all cells, and how many images the budget left out."""

    cells: tuple[CellExhibits, ...]
    left_out: int
    budget: int


def gallery(cells: Sequence[Cell], folder: Path, budget: int = BUDGET) -> Gallery:
    """Best victims of all cells first, then the worst, then the median ones, until the budget is spent."""
    chosen = [CellExhibits(number, cell, chosen_victims(cell)) for number, cell in enumerate(cells, 1)]
    chosen = [entry for entry in chosen if entry.exhibits]
    filled: dict[tuple[int, int], Exhibit] = {}
    spent, left_out = 0, 0
    order = sorted(
        ((place, index) for index, entry in enumerate(chosen) for place in range(len(entry.exhibits))),
        key=lambda pair: ((0, 2, 1)[pair[0]], pair[1]),
    )
    for place, index in order:
        exhibit, used, dropped = _filled(chosen[index].exhibits[place], folder, budget - spent)
        filled[index, place] = exhibit
        spent, left_out = spent + used, left_out + dropped
    return Gallery(
        cells=tuple(
            replace(entry, exhibits=tuple(filled[index, place] for place in range(len(entry.exhibits))))
            for index, entry in enumerate(chosen)
        ),
        left_out=left_out,
        budget=budget,
    )


def chosen_victims(cell: Cell) -> tuple[Exhibit, ...]:
    """The best, median and worst finished victim of a cell by mean SSIM; fewer where there are fewer victims.

    Without ground truth by the attack's own objective, the lowest first; victims for whom nothing came back are left out.
    """
    victims: dict[str, list[ImageResult]] = {}
    for result in cell.results:
        shown = bool(result.reconstruction_image) if cell.unscored else result.ssim is not None
        if result.finished and shown:
            victims.setdefault(result.case, []).append(result)
    ranked = sorted(victims.values(), key=_explained if cell.unscored else _quality, reverse=True)
    if not ranked:
        return ()
    if len(ranked) == 1:
        places = [("The only victim", 0)]
    elif len(ranked) == 2:
        places = [("Best of 2 victims", 0), ("Worst of 2 victims", 1)]
    else:
        last = len(ranked) - 1
        places = [(f"Best of {last + 1} victims", 0), ("Median victim", last // 2), ("Worst victim", last)]
    return tuple(
        Exhibit(rank, tuple(sorted(ranked[place], key=lambda result: result.position))) for rank, place in places
    )


def picture(folder: Path, relative: str, budget: int) -> tuple[Picture, int]:
    """A PNG of the output folder as a data URI, and the bytes that it takes; nothing outside the folder is read."""
    if not relative:
        return Picture(missing="not stored"), 0
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder.resolve()):
        return Picture(missing="lies outside the output folder"), 0
    try:
        size = path.stat().st_size
        if size * 4 // 3 > budget:
            return Picture(missing="left out to keep this file small"), 0
        content = path.read_bytes()
    except OSError:
        return Picture(missing="file is missing"), 0
    if not content.startswith(_PNG) or len(content) < 24:
        return Picture(missing="file is not a PNG"), 0
    width, height = struct.unpack(">II", content[16:24])
    scale = max(1, -(-ENLARGED // max(width, height, 1)))
    uri = f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
    return Picture(uri, width * scale, height * scale, pixelated=scale > 1), len(uri)


def _filled(exhibit: Exhibit, folder: Path, budget: int) -> tuple[Exhibit, int, int]:
    pairs, spent, left_out = [], 0, 0
    for result in exhibit.results[:MOST_IMAGES]:
        shown: list[Picture] = []
        for relative in (
            result.truth_image,
            result.reconstruction_image,
            result.truth_mask,
            result.reconstruction_mask,
        ):
            found, used = picture(folder, relative, budget - spent)
            shown.append(found)
            spent += used
        left_out += sum("left out" in found.missing for found in shown)
        truth, reconstruction, mask, mask_found = shown
        pairs.append(
            Pair(
                result,
                truth,
                reconstruction,
                mask if result.truth_mask else None,
                mask_found if result.reconstruction_mask else None,
            )
        )
    more = len(exhibit.results) - len(pairs)
    return replace(exhibit, pairs=tuple(pairs), more=more), spent, left_out


def _explained(results: Sequence[ImageResult]) -> tuple[float, float]:
    """The lower the objective, the better; victims of attacks without one come last."""
    found = results[0].objective
    return (float("-inf"), 0.0) if found is None else (-found, 0.0)


def _quality(results: Sequence[ImageResult]) -> tuple[float, float]:
    """Mean SSIM, then mean PSNR of a victim's images."""
    return _mean([result.ssim for result in results]), _mean([result.psnr for result in results])


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("-inf")

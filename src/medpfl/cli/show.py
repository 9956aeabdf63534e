"""`medpfl show DIR CASE`: one case with its scores and, in a terminal, its pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from rich.columns import Columns
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from medpfl.cli.texts import printable
from medpfl.core.errors import InputError, StoreError, suggestion
from medpfl.report.loading import Row, boolean, number, read_table

NUMBERS = ("psnr", "ssim", "mse")
NULLS = ("class_mean", "nearest", "noise")
PER_CASE = (
    "dataset", "model", "recipe", "threat_model", "channel", "defense", "guard", "attack", "oracle", "seed",
    "diagnosis_of", "change",
)  # fmt: skip
WIDEST = 64
"""Columns of the terminal that one picture takes at most."""


def register(app: typer.Typer) -> None:
    """Adds `show`."""
    app.command("show")(show)


def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="output folder of an audit", show_default=False)],
    case: Annotated[
        str,
        typer.Argument(metavar="CASE", help="`case` of results.csv, or a part that only one has", show_default=False),
    ],
    picture: Annotated[
        bool | None,
        typer.Option("--picture/--no-picture", help="draw truth and reconstruction  [default: in a terminal]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="write JSON to standard output instead of text")] = False,
) -> None:
    """Show one case: scores of its images beside the null baselines, effort, and truth and reconstruction.

    \b
    Examples:
      medpfl show out/demo s0/v3
      medpfl show out/demo gradinv/s0/v0 --json
    """
    rows = case_rows(folder, case)
    if as_json:
        typer.echo(json.dumps([_typed(row) for row in rows], indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    _print_case(console, rows)
    _print_utility(console, folder, rows[0].get("cell", ""))
    if picture if picture is not None else console.is_terminal:
        painter = console if console.is_terminal else Console(force_terminal=True, color_system="truecolor")
        _print_pictures(painter, folder, rows)


def case_rows(folder: Path, case: str) -> list[Row]:
    """The rows of `results.csv` of the one case whose id is `case`, ends with it or contains it, in that order.

    Cases that exist for a diagnosis only are looked at last.

    Raises StoreError where there are no results, InputError where no case or more than one fits.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder}: there is no such folder; give the --out folder of an audit")
    rows = read_table(folder / "results.csv")
    if not rows:
        raise StoreError(f"{folder}: results.csv is missing or has no rows yet; run 'medpfl audit SPEC --out {folder}'")
    known = list(dict.fromkeys(row.get("case", "") for row in rows))
    own = list(dict.fromkeys(row.get("case", "") for row in rows if not row.get("diagnosis_of")))
    ends = [name for name in own if name == case or name.endswith(f"/{case}")]
    parts = (ends, [name for name in own if case in name], [name for name in known if case in name])
    fits = [case] if case in known else next(filter(None, parts), [])
    if not fits:
        hint = suggestion(case, known) if len(known) <= 12 else f"there are {len(known)} cases such as '{known[0]}'"
        raise InputError(f"{folder} has no case '{case}': {hint}")
    if len(fits) > 1:
        some = ", ".join(fits[:5]) + (", ..." if len(fits) > 5 else "")
        raise InputError(f"'{case}' fits {len(fits)} cases: {some}; give more of the id")
    return [row for row in rows if row.get("case", "") == fits[0]]


def half_blocks(pixels: NDArray[np.uint8]) -> Text:
    """Pixels (H, W, 3) as lines of upper half blocks: each character shows two rows in 24-bit color."""
    height, width = pixels.shape[:2]
    text = Text(no_wrap=True)
    for top in range(0, height, 2):
        for column in range(width):
            upper = _color(pixels[top, column])
            lower = _color(pixels[top + 1, column]) if top + 1 < height else None
            text.append("▀", Style.parse(upper if lower is None else f"{upper} on {lower}"))
        text.append("\n")
    return text


def _print_case(console: Console, rows: Sequence[Row]) -> None:
    first = rows[0]
    console.print(Text(printable(first.get("case", "")), style="bold"))
    for name in PER_CASE:
        if first.get(name):
            console.print(Text(f"{name.replace('_', ' ')}: {printable(first[name])}"))
    effort = (("objective", ""), ("gradient_evaluations", ""), ("seconds", " s"), ("stop_reason", ""))
    for name, unit in effort:
        if first.get(name):
            console.print(Text(f"{name.replace('_', ' ')}: {_short(first[name])}{unit}"))
    for text in dict.fromkeys(row.get("reason", "") for row in rows):
        if text:
            console.print(Text(f"reason: {printable(text)}"))
    for text in dict.fromkeys(row.get("notes", "") for row in rows):
        if text:
            console.print(Text(f"notes: {printable(text)}"))
    scores = Table("image", "status", "PSNR", "SSIM", "MSE", "success", "label", "inferred", box=None, pad_edge=False)
    nulls = Table("image", box=None, pad_edge=False)
    for null in NULLS:
        for metric in ("PSNR", "SSIM"):
            nulls.add_column(f"{null.replace('_', ' ')} {metric}")
    for row in rows:
        position = row.get("position", "")
        middle = [_short(row.get(name, "")) for name in NUMBERS]
        tail = [_short(row.get(name, "")) for name in ("success", "label", "label_inferred")]
        scores.add_row(*(Text(text) for text in (position, row.get("status", ""), *middle, *tail)))
        baseline = [_short(row.get(f"null_{null}_{metric}", "")) for null in NULLS for metric in ("psnr", "ssim")]
        nulls.add_row(*(Text(text) for text in (position, *baseline)))
    console.print()
    console.print(scores)
    console.print(Text("\nNull baselines (no update used)"))
    console.print(nulls)
    console.print()
    for row in rows:
        for name in ("item", "truth_image", "reconstruction_image", "truth_mask", "reconstruction_mask", "mask_dice"):
            if row.get(name):
                text = f"{row.get('position', '')} {name.replace('_', ' ')}: {printable(row[name])}"
                console.print(Text(text), soft_wrap=True)


def _print_utility(console: Console, folder: Path, cell: str) -> None:
    """What a model is worth that is trained under the case's defense, where that was measured."""
    row = next((row for row in read_table(folder / "cells.csv") if row.get("cell") == cell), {})
    for name in ("balanced_accuracy", "auc"):
        value, low, high = (row.get(f"utility_{name}{end}", "") for end in ("", "_low", "_high"))
        if value:
            text = (
                f"utility of its setting, {name.replace('_', ' ')}: {_short(value)} ({_short(low)} to {_short(high)})"
            )
            console.print(Text(text))


def _print_pictures(console: Console, folder: Path, rows: Sequence[Row]) -> None:
    for row in rows:
        names = [row.get("truth_image", ""), row.get("reconstruction_image", "")]
        if not all(names):
            console.print(Text(f"\nImage {row.get('position', '')}: no picture was kept"))
            continue
        width = max(8, min(WIDEST, console.width // 2 - 2))
        console.print(Text(f"\nImage {row.get('position', '')}: truth and reconstruction"))
        console.print(Columns([half_blocks(_pixels(folder, name, width)) for name in names], padding=(0, 2)))


def _pixels(folder: Path, name: str, width: int) -> NDArray[np.uint8]:
    """The picture as (H, W, 3), made smaller if it is wider than `width`."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise StoreError(f"{folder}/results.csv names '{printable(name)}', which lies outside the folder")
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, UnidentifiedImageError):
        raise StoreError(f"{path}: cannot be read as an image; run the audit again, or use --no-picture") from None
    if picture.width > width:
        picture = picture.resize((width, max(1, round(picture.height * width / picture.width))))
    return np.asarray(picture, dtype=np.uint8)


def _color(pixel: NDArray[np.uint8]) -> str:
    return "#" + "".join(f"{int(value):02x}" for value in pixel)


def _short(text: str) -> str:
    """A number to four digits, `-` for nothing, other texts as they are."""
    value = number(text)
    return f"{value:.4g}" if value is not None and not text.isdigit() else printable(text) or "-"


def _typed(row: Row) -> dict[str, object]:
    """A row with numbers, true, false and null where the table writes them; ids and names stay texts."""
    texts = {*PER_CASE, "case", "cell", "item", "status", "reason", "stop_reason", "truth_image", "notes"} - {"seed"}
    typed: dict[str, object] = {}
    for name, text in row.items():
        value: object = text if text != "" else None
        if text and name not in texts:
            truth, amount = boolean(text), number(text)
            whole = int(text) if text.lstrip("-").isdigit() else amount
            value = truth if truth is not None else text if amount is None else whole
        typed[name] = value
    return typed

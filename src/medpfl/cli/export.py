"""`medpfl export DIR`: a copy of an audit that can be handed on."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.text import Text

from medpfl.cli.texts import printable
from medpfl.core.errors import StoreError
from medpfl.core.files import write_atomically
from medpfl.report import write_report
from medpfl.report.loading import Row, load_audit, read_table
from medpfl.report.redaction import Clean, cleaner, data_entries, numbered_clients, redacted, spec_values
from medpfl.report.views import AXES

COPIED = ("results.csv", "cells.csv", "diagnosis.csv", "summary.json", "spec.yaml")
IMAGE_SUFFIXES = (".png", ".npz")
EMPTIED_COLUMNS = ("item", "truth_image", "reconstruction_image", "truth_mask", "reconstruction_mask", "notes")
KEPT_COLUMNS = frozenset({"case", "cell", "status", "oracle", "diagnosis_of", "change", *AXES})
"""Ids and fixed words: they are what other tables and commands refer to."""


def register(app: typer.Typer) -> None:
    """Adds `export`."""
    app.command("export")(export)


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="output folder of an audit", show_default=False)],
    without_images: Annotated[
        bool, typer.Option("--without-images", help="leave out images, item names, and where the data lies")
    ] = False,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DEST", help="new folder  [default: DIR-export]", show_default=False)
    ] = None,
) -> None:
    """Copy tables, summary, spec and a fresh report into a new folder, never the store.

    With --without-images the copy holds no image, no item name and no path of the data, also not in the report.

    \b
    Examples:
      medpfl export out/demo --without-images
      medpfl export out/demo --without-images --to /media/stick/audit
    """
    destination = write_export(folder, to, images=not without_images)
    console = Console(highlight=False)
    console.print(Text(f"Written: {printable(str(destination))}"), soft_wrap=True)
    if without_images:
        console.print(Text("It holds no images, item names or data paths; labels and names in the spec are yours."))
    else:
        console.print(Text("It holds images of patients; --without-images leaves them out."))


def write_export(folder: Path, destination: Path | None, *, images: bool) -> Path:
    """Writes the copy and returns its folder, readable by its owner only; it appears complete or not at all.

    Raises StoreError where `folder` is no output folder of an audit, or the destination exists or cannot be written.
    """
    load_audit(folder)
    source = folder.resolve()
    target = source.with_name(f"{source.name}-export") if destination is None else destination
    if os.path.lexists(target):
        raise StoreError(f"{target}: exists already; give another folder with --to")
    if target.resolve().is_relative_to(source):
        raise StoreError(f"{target}: lies inside the audit's own folder; give another folder with --to")
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.mkdir(mode=0o700)
        if images:
            _copy(source, temporary)
        else:
            _copy_without_images(source, temporary)
        write_report(temporary, images=images)
        temporary.rename(target)
    except OSError as error:
        raise StoreError(f"{target}: cannot be written ({error.strerror}); give another folder with --to") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _copy(source: Path, destination: Path) -> None:
    names = [Path(name) for name in COPIED]
    pictures = sorted((source / "images").rglob("*")) if (source / "images").is_dir() else []
    names += [path.relative_to(source) for path in pictures if path.suffix in IMAGE_SUFFIXES]
    for name in names:
        path = source / name
        if path.is_file() and path.resolve().is_relative_to(source):
            write_atomically(destination / name, path.read_bytes())


def _copy_without_images(source: Path, destination: Path) -> None:
    results, cells = read_table(source / "results.csv"), read_table(source / "cells.csv")
    spec, summary = spec_values(_text(source / "spec.yaml")), _parsed(_text(source / "summary.json"))
    params = [_parsed(row.get("dataset_params", "")) for row in cells]
    clean = cleaner({row["item"] for row in results if row.get("item")}, [*data_entries(spec), *params])
    if spec:
        text = yaml.safe_dump(redacted(spec, clean), sort_keys=False, allow_unicode=True)
        write_atomically(destination / "spec.yaml", text.encode("utf-8"))
    if summary:
        if summary.get("updates"):
            summary = {**summary, "updates": list(numbered_clients(summary["updates"]))}
        text = json.dumps(redacted(summary, clean), indent=2, ensure_ascii=False) + "\n"
        write_atomically(destination / "summary.json", text.encode("utf-8"))
    _write_table(destination / "results.csv", [_row(row, clean) for row in results])
    _write_table(destination / "cells.csv", [_row(row, clean) for row in cells])
    told = numbered_clients(read_table(source / "diagnosis.csv"))
    _write_table(destination / "diagnosis.csv", [_row(row, clean) for row in told])


def _row(row: Row, clean: Clean) -> Row:
    cleaned: dict[str, str] = {}
    for name, text in row.items():
        if name in EMPTIED_COLUMNS:
            cleaned[name] = ""
        elif name.endswith("_params") and text:
            cleaned[name] = json.dumps(redacted(_parsed(text), clean), ensure_ascii=False)
        else:
            cleaned[name] = text if name in KEPT_COLUMNS else clean(text)
    return cleaned


def _write_table(path: Path, rows: Sequence[Row]) -> None:
    if not rows:
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode("utf-8"))


def _parsed(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""

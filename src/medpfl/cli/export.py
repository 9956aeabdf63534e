"""`medpfl export DIR`: a copy of an audit that can be handed on."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.text import Text

from medpfl.audit.files import write_atomically
from medpfl.cli.texts import printable
from medpfl.core.errors import StoreError
from medpfl.report import write_report
from medpfl.report.loading import Row, load_audit, read_table
from medpfl.report.redaction import item_cleaner
from medpfl.report.views import AXES

WITHHELD = "(withheld)"
"""What stands in place of paths and file lists."""

COPIED = ("results.csv", "cells.csv", "summary.json", "spec.yaml")
IMAGE_SUFFIXES = (".png", ".npz")
EMPTIED_COLUMNS = ("item", "truth_image", "reconstruction_image", "notes")
KEPT_COLUMNS = frozenset({"case", "cell", "status", "oracle", *AXES})
"""Ids and fixed words: they are what other tables and commands refer to."""
WITHHELD_KEYS = frozenset({"path", "files", "pattern", "factory_folders"})
"""Settings that name files and folders."""
CHECKPOINT = re.compile(r"[./\\:]")
"""What a model's `state` contains where it is a path, of which the file's name is kept."""

Clean = Callable[[str], str]


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
    spec, summary = _yaml(source / "spec.yaml"), _json(source / "summary.json")
    params = [_parsed(row.get("dataset_params", "")) for row in cells]
    clean = _cleaner(results, [*_data_entries(spec), *params])
    if spec:
        text = yaml.safe_dump(_redacted(spec, clean), sort_keys=False, allow_unicode=True)
        write_atomically(destination / "spec.yaml", text.encode("utf-8"))
    if summary:
        text = json.dumps(_redacted(summary, clean), indent=2, ensure_ascii=False) + "\n"
        write_atomically(destination / "summary.json", text.encode("utf-8"))
    _write_table(destination / "results.csv", [_row(row, clean) for row in results])
    _write_table(destination / "cells.csv", [_row(row, clean) for row in cells])


def _cleaner(results: Sequence[Row], settings: Sequence[Mapping[str, Any]]) -> Clean:
    """Takes item names and the settings of the data that name files out of a text."""
    without_item = item_cleaner({row["item"] for row in results if row.get("item")})
    paths: set[str] = set()
    for entry in settings:
        for key in WITHHELD_KEYS - {"pattern"}:
            value = entry.get(key)
            paths |= {text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)}
    tails = {re.sub(r"^(\.{0,2}/|~/)+", "", path).rstrip("/") for path in paths}
    patterns = [_path_pattern(tail) for tail in sorted(tails, key=lambda tail: (-len(tail), tail)) if tail]

    def clean(text: str) -> str:
        for pattern in patterns:
            text = pattern.sub(WITHHELD, text)
        return without_item(text)

    return clean


def _path_pattern(tail: str) -> re.Pattern[str]:
    """A path that holds `tail`, however it starts and goes on; one word alone counts only behind a slash."""
    start = "" if "/" in tail else "/"
    return re.compile(rf"[^\s'\"]*{start}(?<![\w-]){re.escape(tail)}(?![\w-])[^\s'\":,;]*")


def _row(row: Row, clean: Clean) -> Row:
    cleaned: dict[str, str] = {}
    for name, text in row.items():
        if name in EMPTIED_COLUMNS:
            cleaned[name] = ""
        elif name.endswith("_params") and text:
            cleaned[name] = json.dumps(_redacted(_parsed(text), clean), ensure_ascii=False)
        else:
            cleaned[name] = text if name in KEPT_COLUMNS else clean(text)
    return cleaned


def _redacted(value: Any, clean: Clean) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {key: _redacted_setting(key, part, clean) for key, part in value.items()}
    return [_redacted(part, clean) for part in value] if isinstance(value, (list, tuple)) else value


def _redacted_setting(key: str, value: Any, clean: Clean) -> Any:
    if key in WITHHELD_KEYS and value:
        return WITHHELD
    if key == "state" and isinstance(value, str) and CHECKPOINT.search(value):
        return f"{WITHHELD}/{PureWindowsPath(value).name}"  # both kinds of slashes part folders
    return _redacted(value, clean)


def _data_entries(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    entries = spec.get("data")
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


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


def _json(path: Path) -> Mapping[str, Any]:
    return _parsed(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _yaml(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        raise StoreError(f"{path}: not valid YAML, so nothing can be withheld from it; run the audit again") from None
    return value if isinstance(value, dict) else {}

"""Takes item names and the paths of data out of an audit, so that it can be shared."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from medpfl.core.errors import StoreError
from medpfl.report.views import Audit, Cell, ImageResult

REMOVED = "[item]"
"""What stands in place of an item name."""

WITHHELD = "(withheld)"
"""What stands in place of paths and file lists."""

WITHHELD_KEYS = frozenset({"path", "mask_path", "files", "pattern", "factory_folders"})
"""Settings that name files and folders."""
CHECKPOINT = re.compile(r"[./\\:]")
"""What a model's `state` contains where it is a path, of which the file's name is kept."""

_SHORTEST_NAME = 4

Clean = Callable[[str], str]


def without_items(audit: Audit) -> Audit:
    """The same audit without item names and paths of images and data, also where a reason or a note quotes one.

    Item names of fewer than four characters are only taken out of their own column: in a text they cannot be told
    from ordinary words and numbers.
    """
    spec = spec_values(audit.spec_text)
    items = {result.item for cell in (*audit.cells, *audit.sweep) for result in cell.results if result.item}
    clean = cleaner(items, data_entries(spec))
    return replace(
        audit,
        cells=tuple(_cell(cell, clean) for cell in audit.cells),
        sweep=tuple(_cell(cell, clean) for cell in audit.sweep),
        diagnosis=tuple(redacted(entry, clean) for entry in audit.diagnosis),
        updates=tuple(redacted(entry, clean) for entry in numbered_clients(audit.updates)),
        warnings=tuple(clean(text) for text in audit.warnings),
        data=tuple(redacted(entry, clean) for entry in audit.data),
        assumptions=tuple(redacted(entry, clean) for entry in audit.assumptions),
        findings=tuple(redacted(entry, clean) for entry in audit.findings),
        plan=redacted(audit.plan, clean),
        spec_text=yaml.safe_dump(redacted(spec, clean), sort_keys=False, allow_unicode=True) if spec else "",
    )


def _cell(cell: Cell, clean: Clean) -> Cell:
    return replace(
        cell,
        params=redacted(cell.params, clean),
        reason=clean(cell.reason),
        warnings=tuple(clean(text) for text in cell.warnings),
        results=tuple(_result(result, clean) for result in cell.results),
    )


def _result(result: ImageResult, clean: Clean) -> ImageResult:
    return replace(
        result,
        item="",
        truth_image="",
        reconstruction_image="",
        truth_mask="",
        reconstruction_mask="",
        reason=clean(result.reason),
        stop_reason=clean(result.stop_reason),
    )


def cleaner(items: set[str], settings: Sequence[Mapping[str, Any]]) -> Clean:
    """Takes item names and the settings of the data that name files out of a text."""
    without_item = item_cleaner(items)
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


def redacted(value: Any, clean: Clean) -> Any:
    """Texts cleaned wherever they stand in a value of YAML or JSON, settings that name files withheld."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {key: _redacted_setting(key, part, clean) for key, part in value.items()}
    return [redacted(part, clean) for part in value] if isinstance(value, (list, tuple)) else value


def numbered_clients(entries: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """The same entries about recorded updates with a number in place of each client's name, also where a text has it.

    >>> numbered_clients([{"client": "ward", "text": "client ward sent nothing"}])
    ({'client': '1', 'text': 'client 1 sent nothing'},)
    """
    names = dict.fromkeys(str(entry.get("client", "")) for entry in entries)
    numbers = {name: str(number) for number, name in enumerate(names, start=1)}
    longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pattern = re.compile(rf"client ({longest_first})(?!\w)")

    def clean(text: str) -> str:
        return pattern.sub(lambda found: f"client {numbers[found[1]]}", text)

    return tuple({**redacted(entry, clean), "client": numbers[str(entry.get("client", ""))]} for entry in entries)


def _redacted_setting(key: str, value: Any, clean: Clean) -> Any:
    if key in WITHHELD_KEYS and value:
        return WITHHELD
    if key == "state" and isinstance(value, str) and CHECKPOINT.search(value):
        return f"{WITHHELD}/{PureWindowsPath(value).name}"  # both kinds of slashes part folders
    return redacted(value, clean)


def spec_values(text: str) -> Mapping[str, Any]:
    """The text of `spec.yaml` as values, empty where there is none. Raises StoreError where it is no YAML."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise StoreError("spec.yaml: not valid YAML, so nothing can be withheld from it; run the audit again") from None
    return value if isinstance(value, dict) else {}


def data_entries(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of a spec's `data`."""
    entries = spec.get("data")
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def item_cleaner(items: set[str]) -> Clean:
    """Replaces item names, and the file names of items that are paths, where they stand as whole words."""
    files = {PurePosixPath(item.replace("\\", "/")).name for item in items}
    names = sorted((name for name in items | files if len(name) >= _SHORTEST_NAME), key=lambda name: (-len(name), name))
    seen: dict[str, str] = {}

    def clean(text: str) -> str:
        if text not in seen:
            cleaned = text
            for name in names:
                if name in cleaned:
                    cleaned = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", REMOVED, cleaned)
            seen[text] = cleaned
        return seen[text]

    return clean

"""Takes item names out of an audit, so that its report can be shared."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from medpfl.report.views import Audit, Cell, ImageResult

REMOVED = "[item]"
"""What stands in place of an item name."""

_SHORTEST_NAME = 4

Clean = Callable[[str], str]


def without_items(audit: Audit) -> Audit:
    """The same audit without item names and image paths, also where a reason, a note or the spec quotes one.

    Item names of fewer than four characters are only taken out of their own column: in a text they cannot be told
    from ordinary words and numbers.
    """
    clean = item_cleaner({result.item for cell in audit.cells for result in cell.results if result.item})
    return replace(
        audit,
        cells=tuple(_cell(cell, clean) for cell in audit.cells),
        warnings=tuple(clean(text) for text in audit.warnings),
        data=tuple(_mapping(entry, clean) for entry in audit.data),
        assumptions=tuple(_mapping(entry, clean) for entry in audit.assumptions),
        findings=tuple(_mapping(entry, clean) for entry in audit.findings),
        plan=_mapping(audit.plan, clean),
        spec_text=clean(audit.spec_text),
    )


def _cell(cell: Cell, clean: Clean) -> Cell:
    return replace(
        cell,
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
        reason=clean(result.reason),
        stop_reason=clean(result.stop_reason),
    )


def _mapping(entry: Mapping[str, Any], clean: Clean) -> Mapping[str, Any]:
    return {key: _value(value, clean) for key, value in entry.items()}


def _value(value: Any, clean: Clean) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return _mapping(value, clean)
    return [_value(part, clean) for part in value] if isinstance(value, (list, tuple)) else value


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

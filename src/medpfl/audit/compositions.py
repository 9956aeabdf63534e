"""Reads a composition of defenses from plain values. Raises SpecError."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from medpfl.core.errors import SpecError, suggestion
from medpfl.defenses import Composition, Defense

KEYS = ("compose", "label", "only")
"""Keys of an entry that composes defenses."""


def composition(
    raw: Mapping[str, Any], where: str, read: Callable[[Mapping[str, Any], str], tuple[str, dict[str, Any], Any]]
) -> tuple[str, dict[str, Any], Defense]:
    """Name, settings and defense of `{compose: [{name: clip, bound: 1}, {name: laplace}], label: ...}`.

    The name joins those of the parts. `read` gives name, settings and defense of one part and its place.
    """
    for key in raw:
        if key not in KEYS:
            raise SpecError(f"{where}: unknown key '{key}' beside compose: {suggestion(str(key), KEYS)}")
    given = raw["compose"]
    if not isinstance(given, list) or not given:
        raise SpecError(
            f"{where}.compose: expected a list such as [{{name: clip}}, {{name: gaussian}}], found {given!r}"
        )
    parts = []
    for number, one in enumerate(given):
        place = f"{where}.compose[{number}]"
        if not isinstance(one, dict):
            raise SpecError(f"{place}: expected a mapping such as {{name: clip}}, found {one!r}")
        if misplaced := [key for key in KEYS if key in one]:
            raise SpecError(f"{place}.{misplaced[0]}: belongs beside compose, not inside it")
        parts.append(read(one, place))
    described = [{"name": name, **params} for name, params, _ in parts]
    return "-".join(name for name, _, _ in parts), {"compose": described}, Composition(tuple(one for *_, one in parts))

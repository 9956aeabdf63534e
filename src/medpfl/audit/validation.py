"""From plain YAML values to configurations, with errors that name the field, the problem and a way out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from medpfl.core.errors import SpecError, suggestion

T = TypeVar("T")


def field_names(config: type[Any]) -> list[str]:
    """Names that a configuration class accepts."""
    return [field.name for field in fields(config)] if is_dataclass(config) else []


def build(config: type[T], values: Mapping[str, Any], where: str, extra_known: tuple[str, ...] = ()) -> T:
    """Builds a configuration from plain values; raises SpecError with the field's place in the spec.

    `extra_known` are keys that are valid at this place although the configuration does not have them; they only
    take part in suggestions.
    """
    known = [*field_names(config), *extra_known]
    for key in values:
        if key not in field_names(config):
            raise SpecError(f"{where}: unknown key '{key}': {suggestion(str(key), known)}")
    try:
        return TypeAdapter(config).validate_python(dict(values))
    except ValidationError as error:
        raise SpecError(describe(error, where, values)) from None


def describe(error: ValidationError, where: str, values: Mapping[str, Any]) -> str:
    """One sentence for the first problem, and how many more there are."""
    problems = error.errors(include_url=False)
    first = problems[0]
    place = ".".join([where, *[str(part) for part in first["loc"] if part in values or isinstance(part, int)]])
    message = first["msg"].removeprefix("Value error, ")
    found = first.get("input")
    shown = repr(found)
    found_text = "" if first["type"] == "missing" else f", found {shown if len(shown) < 80 else shown[:77] + '...'}"
    if first["type"] == "missing":
        place = where
        message = f"missing key '{first['loc'][-1]}'"
    more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
    return f"{place}: {message[0].lower() + message[1:]}{found_text}{more}"


def as_plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON-like values, for hashes, stores and `X_params` columns."""
    dumped = TypeAdapter(type(config)).dump_python(config, mode="json")
    return dict(dumped)

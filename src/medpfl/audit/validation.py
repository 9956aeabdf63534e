"""From plain YAML values to configurations, with errors that name the field, the problem and a way out."""

from __future__ import annotations

import re
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


_WORDS = (
    (r"^Field required", "a longer list"),
    (r"^Tuple should have", "a list with"),
    (r"^String should have", "text with"),
    (r"^Input should (be )?", ""),
    (r"^(greater|less) than", r"a number \1 than"),
    (r"a valid string", "text"),
    (r"a valid tuple", "a list"),
    (r"a valid integer", "a whole number"),
    (r"valid boolean", "true or false"),
    (r"valid ", ""),
)
"""Words of pydantic (for Python objects) and ours (for YAML)."""


def describe(error: ValidationError, where: str, values: Mapping[str, Any]) -> str:
    """One sentence for the first problem, and how many more there are."""
    problems = error.errors(include_url=False)
    first = problems[0]
    field = first["loc"][0] if first["loc"] else None
    others = len({problem["loc"][:1] for problem in problems}) - 1
    more = f" (and {others} more wrong keys)" if others > 1 else " (and another wrong key)" if others else ""
    if field is None:  # a check of several fields together says itself what it found
        message = first["msg"].removeprefix("Value error, ")
        return f"{where}: {message}{more}"
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return f"{where}: missing key '{field}'{more}"
    wanted = dict.fromkeys(_wanted(problem["msg"]) for problem in problems if problem["loc"][0] == field)
    found = repr(values.get(str(field), first.get("input")))
    shown = found if len(found) < 80 else found[:77] + "..."
    return f"{where}.{field}: expected {', or '.join(wanted)}, found {shown}{more}"


def _wanted(message: str) -> str:
    """What pydantic expects, in the words of a spec."""
    text = re.sub(r"(, unable to parse| after validation|, not \d).*", "", message.removeprefix("Value error, "))
    for theirs, ours in _WORDS:
        text = re.sub(theirs, ours, text)
    return text


def as_plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON-like values, for hashes, stores and `X_params` columns."""
    dumped = TypeAdapter(type(config)).dump_python(config, mode="json")
    return dict(dumped)

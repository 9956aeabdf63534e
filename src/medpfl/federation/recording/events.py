"""The lines of a recording's log: one JSON object each, written after the file that it names is complete."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.core.domain import UpdateKind

FORMAT = 1
"""Version of the recording's format."""

LONGEST = 200
"""Characters that are kept of a setting that JSON does not know."""

ORDER = "medpfl_order"
"""Key in a file's metadata: names of its tensors in the order of the model, which safetensors does not keep."""

Kind = Literal["begun", "sent", "received", "failed", "stopped"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class About:
    """What the recorder knows of the federation; everything may be left out and given at replay."""

    source: Annotated[str, Field(description="what recorded, for instance `flower 1.41`")] = ""
    channel: Annotated[str, Field(description="channel of the updates: plain, secagg_plus")] = "plain"
    defense: Annotated[str, Field(description="what clients do to updates before they send them, in words")] = ""
    notes: Annotated[str, Field(description="anything that a reader should know")] = ""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Event:
    """One line of the log.

    begun: somebody started to record here. sent: the server sent these tensors, to `client` or, where that is empty,
    to all. received: `client` answered. failed: no usable answer came, with the `reason`. stopped: recording ended
    before training, with the `reason`.
    """

    event: Kind
    time: float
    format: int = FORMAT
    round: int | None = None
    client: str = ""
    file: str = ""
    sha256: str = ""
    size: int = 0
    kind: UpdateKind | None = None
    examples: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    about: About | None = None

    def line(self) -> str:
        """The event as one line of JSON; what is empty is left out."""
        values = dataclasses.asdict(self)
        kept = {key: value for key, value in values.items() if value not in (None, "", {}) or key == "event"}
        return json.dumps(kept, ensure_ascii=True, sort_keys=True, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    """A number of NumPy or PyTorch as such, anything else that JSON does not know as some of its words."""
    return value.item() if getattr(value, "ndim", None) == 0 else str(value)[:LONGEST]


_EVENT = TypeAdapter(Event)


def parse_line(line: str) -> Event | str:
    """The event that a line holds, or why it holds none (cut off, damaged, of another version).

    >>> parse_line(Event(event="stopped", time=1.0, reason="full").line()).reason
    'full'
    >>> parse_line('{"event": "rec')
    'is no complete line of JSON'
    """
    try:
        values = json.loads(line)
    except json.JSONDecodeError:
        return "is no complete line of JSON"
    if isinstance(values, dict) and values.get("format", FORMAT) != FORMAT:
        return f"has format {values['format']}, this version reads {FORMAT}"
    try:
        return _EVENT.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        return f"has a wrong entry '{'.'.join(str(part) for part in first['loc'])}': {first['msg']}"

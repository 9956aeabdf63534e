"""Reads recordings, also such as were cut off in the middle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load

from medpfl.core.domain import Tensors, UpdateKind
from medpfl.core.errors import DataError
from medpfl.federation.recording.events import ORDER, About, Event, parse_line
from medpfl.federation.recording.storage import FolderStorage, Storage


@dataclass(frozen=True)
class Recorded:
    """One message with tensors: what was sent (`client` empty: to all) or received.

    kind and examples: of an answer; None where it did not say. `tensors` are read when they are first used; raises
    DataError then if the file is damaged.
    """

    storage: Storage
    round: int
    client: str
    file: str
    sha256: str
    kind: UpdateKind | None = None
    examples: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> Tensors:
        """The named tensors as they were."""
        content = self.storage.read(self.file)
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise DataError(f"recording: '{self.file}' is not what was recorded (its digest differs): copy it again")
        try:
            tensors = load(content)
        except SafetensorError as error:
            raise DataError(f"recording: '{self.file}' cannot be read ({error})") from None
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        order = json.loads(header.get("__metadata__", {}).get(ORDER, "[]"))
        return {name: tensors[name] for name in dict.fromkeys([*order, *tensors]) if name in tensors}


@dataclass(frozen=True)
class Recording:
    """A recording as far as it can be used.

    about: what its recorders said, the last one's. sent: by (round, client), the client empty where all got the same.
    updates: in order of round and client. problems: sentences on what is missing or damaged, failures of clients
    included; nothing else is left out.
    """

    about: About
    sent: Mapping[tuple[int, str], Recorded]
    updates: tuple[Recorded, ...]
    problems: tuple[str, ...] = ()

    @property
    def rounds(self) -> tuple[int, ...]:
        """Numbers of the rounds with an update."""
        return tuple(sorted({update.round for update in self.updates}))

    def sent_to(self, update: Recorded) -> Recorded | None:
        """What the client of an update had received; None if that was not recorded."""
        return self.sent.get((update.round, update.client)) or self.sent.get((update.round, ""))


def read_recording(storage: Storage | Path | str, *, key: bytes | None = None) -> Recording:
    """Reads a recording's log. Raises DataError if there is none, or none that can be used."""
    found = storage if isinstance(storage, Storage) else FolderStorage(Path(storage), key)
    about, sent, updates, problems = About(), {}, {}, []
    lines = found.lines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        event = parse_line(line)
        if isinstance(event, str):
            last = number == len(lines) or not any(rest.strip() for rest in lines[number:])
            where = "the last line (recording was cut off there)" if last else f"line {number}"
            problems.append(f"{where} of the log {event}")
        elif event.event == "begun":
            about = event.about or about
        elif event.event == "stopped":
            problems.append(f"recording stopped before training did: {event.reason}")
        elif event.round is None or (event.event != "failed" and not event.file):
            problems.append(f"line {number} of the log names no round or no file")
        elif event.event == "failed":
            problems.append(f"round {event.round}, client {event.client}: {event.reason}")
        elif not found.has(event.file):
            problems.append(f"round {event.round}, {event.event} {event.client}: the file '{event.file}' is missing")
        elif event.event == "sent":
            sent[event.round, event.client] = _recorded(found, event)
        else:
            updates[event.round, event.client] = _recorded(found, event)
    return Recording(about, sent, tuple(updates[place] for place in sorted(updates)), tuple(problems))


def _recorded(storage: Storage, event: Event) -> Recorded:
    assert event.round is not None  # the caller looked
    return Recorded(
        storage, event.round, event.client, event.file, event.sha256, event.kind, event.examples, dict(event.config)
    )

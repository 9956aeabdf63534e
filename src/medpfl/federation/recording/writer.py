"""Writes recordings: what the server sent and what clients answered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save

from medpfl.core.domain import UpdateKind
from medpfl.core.errors import DataError, StoreError
from medpfl.federation.recording.arrays import as_tensor
from medpfl.federation.recording.events import ORDER, About, Event, Kind
from medpfl.federation.recording.storage import FolderStorage, Storage

Arrays = Mapping[str, Any]
"""Named tensors or NumPy arrays, as a state dict holds them."""

LIMIT = 8 * 2**30
"""Bytes that a recording may take unless somebody says otherwise."""

PATIENCE = 10.0
"""Seconds for which `record` waits for other processes that record into the same folder."""

LOGGER = logging.getLogger("medpfl.recording")


class Recorder:
    """Writes one recording, as a context manager or until `close`. Goes on where an earlier recorder ended.

    storage: where, for instance a path. limit: bytes after which nothing more is recorded; the log says so and training
    is not disturbed (`stopped`). Tensors of any type that safetensors knows are kept as they are, integers and bfloat16
    included. Raises StoreError if the folder cannot be used or another recorder still writes there after `patience`
    seconds.

    >>> import torch
    >>> from medpfl.federation.recording import MemoryStorage, read_recording
    >>> with Recorder(storage := MemoryStorage()) as recorder:
    ...     recorder.sent(1, {"weight": torch.zeros(2)})
    ...     recorder.received(1, "17", {"weight": torch.ones(2)}, examples=8)
    >>> read_recording(storage).updates[0].tensors["weight"]
    tensor([1., 1.])
    """

    def __init__(
        self, storage: Storage | Path | str, about: About | None = None, *, limit: int = LIMIT, patience: float = 0.0
    ) -> None:
        self._storage = storage if isinstance(storage, Storage) else FolderStorage(Path(storage))
        self._held = contextlib.ExitStack()
        self._held.enter_context(self._storage.lock(patience))
        self._limit = limit
        self._size = self._storage.size()
        self._written: dict[str, str] = {}
        self.stopped: str = ""
        """Why nothing more is recorded; empty while recording goes on."""
        self.failures: list[str] = []
        """Why answers of clients were not usable, in order."""
        self._log("begun", about=about or About())

    def sent(
        self,
        round: int,
        tensors: Arrays,
        *,
        client: str | Sequence[str] = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """The server sent these tensors in that round: to one client, to several, or to all where `client` is empty."""
        clients = (client,) if isinstance(client, str) else tuple(client)
        self._keep("sent", round, clients, tensors, config=dict(config or {}))

    def received(
        self,
        round: int,
        client: str,
        tensors: Arrays,
        *,
        examples: int | None = None,
        kind: UpdateKind = "weights",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """That client answered. examples: number of images that it says it trained on; config: other things it said."""
        if not tensors:
            self.failed(round, client, "the update holds no tensor")
            return
        self._keep(
            "received",
            round,
            (client,),
            tensors,
            examples=None if examples is None else int(examples),
            kind=kind,
            config=dict(config or {}),
        )

    def failed(self, round: int, client: str, reason: str) -> None:
        """That client gave no usable answer."""
        self.failures.append(reason)
        if not self.stopped:
            self._log("failed", round=round, client=client, reason=reason)

    def stop(self, reason: str) -> None:
        """Nothing more is recorded from here on; the log says why."""
        if not self.stopped:
            self._log("stopped", reason=reason)
            self.stopped = reason

    def close(self) -> None:
        """Lets others write there."""
        self._held.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _keep(self, event: Kind, round: int, clients: Sequence[str], tensors: Arrays, **values: Any) -> None:
        if self.stopped or not clients:
            return
        try:
            content = _serialized(tensors)
        except DataError as error:
            for client in clients:
                self.failed(round, client, str(error))
            return
        digest = hashlib.sha256(content).hexdigest()
        name = self._written.get(digest)
        if name is None:
            if self._size + len(content) > self._limit:
                self.stop(
                    f"the recording would take {(self._size + len(content)) / 2**20:.0f} MiB, more than its limit of "
                    f"{self._limit / 2**20:.0f} MiB"
                )
                return
            only = f"-{_safe(clients[0])}" if len(clients) == 1 and clients[0] else ""
            name = f"{round:06d}-{event}{only}-{digest[:12]}.safetensors"
            self._storage.write(name, content)
            self._size += len(content)
            self._written = {digest: name} if event == "sent" else self._written
        for client in clients:
            self._log(event, round=round, client=client, file=name, sha256=digest, size=len(content), **values)

    def _log(self, event: Kind, **values: Any) -> None:
        self._storage.append(Event(event=event, time=time.time(), **values).line())


def record(
    folder: Path | str,
    *,
    sent: Arrays,
    received: Arrays,
    examples: int,
    round: int = 1,
    client: str = "0",
    kind: UpdateKind = "weights",
    about: About | None = None,
) -> bool:
    """Records one client's round in one line: what it got, and what it sends. Returns whether it was recorded.

    sent, received: state dicts (`model.state_dict()`) or any named tensors; with `kind: gradient` or `delta` `received`
    holds gradients or changes. examples: number of images that it trained on. Training is never stopped: where the
    folder cannot be used or tensors cannot be recorded, the reason is a warning of Python's logging and, where possible,
    a line of the recording. Several processes may record into one folder; they wait for each other.

        medpfl.record("recording", sent=before, received=model.state_dict(), examples=len(images))
    """
    try:
        with Recorder(folder, about, patience=PATIENCE) as recorder:
            recorder.sent(round, sent, client=client)
            recorder.received(round, client, received, examples=examples, kind=kind)
            reason = recorder.stopped or "; ".join(recorder.failures)
    except (StoreError, DataError) as error:
        reason = str(error)
    if reason:
        LOGGER.warning("%s: round %d of client %s is not recorded, training goes on: %s", folder, round, client, reason)
    return not reason


def _serialized(tensors: Arrays) -> bytes:
    """The tensors as safetensors. Raises DataError for what it cannot hold."""
    if not isinstance(tensors, Mapping):
        raise DataError(f"named tensors are expected (a state dict), found {type(tensors).__name__}")
    held = {str(name): as_tensor(str(name), value) for name, value in tensors.items()}
    try:
        content: bytes = save(held, metadata={ORDER: json.dumps(list(held))})
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"the tensors cannot be recorded ({str(error).splitlines()[0]})") from None
    return content


def _safe(client: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", client)[:40]

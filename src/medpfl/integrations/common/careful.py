"""A recorder that never stops a training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from medpfl.core.errors import DataError, StoreError
from medpfl.federation.recording import About, MemoryStorage, Recorder, Storage

LOGGER = logging.getLogger("medpfl.integrations")


def carefully(recorder: Recorder, number: int, act: Callable[[], None]) -> None:
    """Records with `act`. What cannot be read thins the recording, everything else ends it; both are warnings."""
    try:
        act()
    except DataError as error:
        LOGGER.warning("round %d is not recorded in full: %s", number, error)
    except StoreError as error:
        LOGGER.warning("round %d is not recorded in full: %s", number, error)
        _give_up(recorder, str(error))
    except Exception as error:
        LOGGER.exception("round %d is not recorded in full: the recorder broke down", number)
        _give_up(recorder, f"the recorder broke down ({type(error).__name__}: {error})")


def recorder_or_none_at_all(storage: Storage | Path | str, about: About, limit: int) -> Recorder:
    """A recorder there; where the storage cannot be used one that records nothing, with a warning."""
    try:
        return Recorder(storage, about, limit=limit)
    except StoreError as error:
        LOGGER.warning("nothing is recorded, training goes on: %s", error)
        nothing = Recorder(MemoryStorage(), about)
        nothing.stopped = str(error)
        return nothing


def _give_up(recorder: Recorder, reason: str) -> None:
    try:
        recorder.stop(reason)
    except StoreError:  # the disk that is full does not take the line either
        recorder.stopped = reason

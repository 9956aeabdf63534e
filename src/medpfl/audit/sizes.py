"""What a round takes whose server sends a larger model than agreed: known before the run, from counts alone."""

from __future__ import annotations

from collections.abc import Iterable

from medpfl.attacks.crafted import BYTES_PER_ADDED
from medpfl.audit.grid import Cell
from medpfl.core.domain import GlobalModel
from medpfl.core.memory import machine_memory

SHARE_FOR_ROUNDS = 0.8
"""Part of the machine's memory that the rounds of all workers together may take."""


def added_entries(cell: Cell, model: GlobalModel) -> int:
    """Trainable entries that the cell's server adds to `model`, the agreed one."""
    return cell.attack.attack.added_parameters(model, cell.channel.channel.client_count)


def bytes_per_added(cell: Cell) -> int:
    """Bytes at the peak of a round per entry that the server adds."""
    return BYTES_PER_ADDED + cell.channel.channel.bytes_per_entry


def round_bytes(cell: Cell, model: GlobalModel) -> int:
    """Bytes at the peak of one of the cell's rounds, of what the server adds only."""
    return bytes_per_added(cell) * added_entries(cell, model)


def fitting_workers(workers: int, rounds: Iterable[int]) -> int:
    """At most so many workers, fewer where rounds that take so many bytes do not fit into memory side by side.

    >>> fitting_workers(8, [])
    8
    >>> fitting_workers(8, [10**18])
    1
    """
    largest = max(rounds, default=0)
    return workers if not largest else max(1, min(workers, int(SHARE_FOR_ROUNDS * machine_memory()) // largest))

"""Memory: what a computation takes at its peak, measured, and how much of the machine's a search may take."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MOST_BY_DEFAULT = 1 << 30
"""Bytes on the CPU beyond which more at once makes nothing faster: its caches are smaller by far."""

SHARE_OF_MACHINE = 0.5
SHARE_OF_GPU = 0.8
"""What a search may take by default of the memory that this process and those beside it have together."""

_budget: ContextVar[int | None] = ContextVar("memory_budget", default=None)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors that `work` held at one time beyond those that were there before.

    Counted from the sizes of all tensors that PyTorch makes on the way, on any device, so the same work always gives
    the same number. What a library uses inside one operation is not seen.

    >>> peak_bytes(lambda: torch.zeros(10, dtype=torch.float64) + 1)
    160
    """
    with _Counting() as counted:
        work()
    return int(counted.peak)


def machine_memory() -> int:
    """Bytes of memory that processes here may use in all: the machine's, or the control group's limit if lower."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _limit_files():
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            found.append(int(text))
    return min(found)


def room(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An empty float32 tensor. On the CPU its memory comes from NumPy, which asks for large pages: the first writing to
    fresh pages of 4 KiB takes several times as long as writing to them."""
    if device.type != "cpu":
        return torch.empty(shape, device=device)
    return torch.from_numpy(numpy.empty(shape, dtype=numpy.float32))


def default_budget(device: torch.device, processes: int) -> int:
    """Bytes for one of so many processes that compute at the same time on the device."""
    if device.type == "cuda":
        return int(SHARE_OF_GPU * torch.cuda.get_device_properties(device).total_memory / processes)
    return min(MOST_BY_DEFAULT, int(SHARE_OF_MACHINE * machine_memory() / processes))


@contextmanager
def memory_budget(size: int) -> Iterator[None]:
    """Inside, one search computes as many candidates at once as need no more than so many bytes."""
    token = _budget.set(size)
    try:
        yield
    finally:
        _budget.reset(token)


def budget(device: torch.device) -> int:
    """The bytes that a search may take now."""
    given = _budget.get()
    return default_budget(device, 1) if given is None else given


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or Python found no memory, on the CPU or a GPU.

    >>> is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"))
    True
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def _limit_files() -> list[Path]:
    """Where control groups (version 2 or 1) keep the limits that hold for this process."""
    root, inside = Path("/sys/fs/cgroup"), "/"
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        if line.startswith("0::"):
            inside = line[3:]
    own = root / inside.lstrip("/")
    groups = [own, *(parent for parent in own.parents if root in (parent, *parent.parents))]
    return [*(group / "memory.max" for group in groups), root / "memory" / "memory.limit_in_bytes"]


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._held = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._held += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._held)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._held -= size


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]

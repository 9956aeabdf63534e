"""Where tensors live and how computations are run there: choosing a device, moving values, and repeatable settings."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from medpfl.core.errors import SpecError

T = TypeVar("T")

CPU = torch.device("cpu")

CUBLAS_WORKSPACE = ":4096:8"
"""Workspace with which cuBLAS gives equal results in every run (its documentation, section on reproducibility)."""


def choose_device(wanted: str, where: str = "device") -> str:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` stands for on this machine; `cuda` means any of its GPUs.

    Raises `SpecError` that names `where` for other words and for GPUs that are not there.

    >>> choose_device("cpu")
    'cpu'
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", wanted):
        raise SpecError(f"{where}: expected auto, cpu, cuda or a GPU such as cuda:0, found '{wanted}'")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return wanted
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (PyTorch was installed without CUDA)"
        raise SpecError(f"{where}: '{wanted}' was asked for, but PyTorch finds no GPU here{built}; use auto or cpu")
    count = torch.cuda.device_count()
    if wanted != "cuda" and int(wanted.partition(":")[2]) >= count:
        raise SpecError(f"{where}: '{wanted}' was asked for, but there are {count} GPUs, counted from cuda:0")
    return wanted


def device_of_worker(device: str, worker: int) -> torch.device:
    """Where the worker with this number computes: `cuda` gives the GPUs out in turn.

    >>> device_of_worker("cpu", 3), device_of_worker("cuda:1", 3)
    (device(type='cpu'), device(type='cuda', index=1))
    """
    if device != "cuda":
        return torch.device(device)
    return torch.device("cuda", worker % max(1, torch.cuda.device_count()))


def accelerator(device: str) -> str:
    """The name of the GPU that is meant, empty for the CPU: other GPUs may round differently."""
    return "" if device == "cpu" else torch.cuda.get_device_name(device_of_worker(device, 0))


@contextmanager
def repeatable(device: torch.device, threads: int) -> Iterator[None]:
    """Inside, PyTorch computes with so many CPU threads, and on a GPU in full precision and always the same.

    Where PyTorch knows no repeatable way for an operation on the GPU, it takes what there is.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if device.type != "cuda":
            yield
            return
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
        strict, warning = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            with (
                torch.cuda.device(device),
                torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
                warnings.catch_warnings(),
            ):
                warnings.filterwarnings("ignore", message=".*deterministic.*", category=UserWarning)
                yield
        finally:
            torch.use_deterministic_algorithms(strict, warn_only=warning)
    finally:
        torch.set_num_threads(before)


def moved(value: T, device: torch.device) -> T:
    """The same value with all its tensors on `device`, however deep in dataclasses, mappings, lists and tuples.

    What needs no move is the same object as before, and what appeared twice is one object again.

    >>> pair = (torch.zeros(2), {"a": [torch.ones(1)]})
    >>> moved(pair, torch.device("cpu")) is pair
    True
    """
    result: T = _moved(value, device, {})
    return result


def _moved(value: Any, device: torch.device, known: dict[int, tuple[Any, Any]]) -> Any:
    if id(value) not in known:
        known[id(value)] = (value, _moved_anew(value, device, known))
    return known[id(value)][1]


def _moved_anew(value: Any, device: torch.device, known: dict[int, tuple[Any, Any]]) -> Any:
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device)
    if isinstance(value, Mapping):
        new: Any = {key: _moved(item, device, known) for key, item in value.items()}
        return value if all(new[key] is item for key, item in value.items()) else new
    if isinstance(value, list | tuple):
        items = [_moved(item, device, known) for item in value]
        return value if all(one is other for one, other in zip(items, value, strict=True)) else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        changed = {name: _moved(part, device, known) for name, part in parts.items()}
        changed = {name: part for name, part in changed.items() if part is not parts[name]}
        return replace(value, **changed) if changed else value
    return value

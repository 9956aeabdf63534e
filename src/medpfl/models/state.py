"""Checkpoints: from files that were not made here, and to and from the cache of trained models."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from medpfl.core.domain import GlobalModel, Tensors
from medpfl.core.errors import ModelError, StoreError
from medpfl.core.functional import is_finite
from medpfl.core.memory import machine_memory
from medpfl.models.probe import summary_of

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts keep the state dict."""

PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "body.")
"""Prefixes that wrappers of a model leave in the names of its tensors."""

TORCH_ERRORS = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    ImportError,
    struct.error,
    SafetensorError,
)
"""What `torch.load` raises on files that are truncated or something else."""


def load_checkpoint(model: GlobalModel, path: Path) -> GlobalModel:
    """The model with the tensors of a safetensors file or of a PyTorch state dict, loaded without executing code.

    A state dict may lie under `state_dict`, `model_state_dict` or `model`, and its names may carry the prefixes
    `module.` or `model.`. All tensors of the model's state dict must be there with their shapes, and no others; batch
    counters may be missing. Raises `ModelError` with the first mismatches.
    """
    path = Path(path)
    return apply_state(model, read_tensors(path), f"checkpoint '{path}'")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors in a checkpoint file: PyTorch state dict, safetensors or npz (arrays by name, in their order).

    Raises `ModelError` if it is not there, holds code, is damaged, or is larger than this machine's memory.
    """
    if not path.is_file():
        raise ModelError(f"checkpoint '{path}' does not exist or is not a file: give a safetensors file or state dict")
    try:
        with path.open("rb") as file:
            start = file.read(9)
            size = path.stat().st_size
    except OSError as error:
        why = (error.strerror or "the system does not say why").lower()
        raise ModelError(f"checkpoint '{path}' cannot be opened: {why}") from error
    if size > machine_memory():
        raise ModelError(
            f"checkpoint '{path}' has {size / 2**30:.1f} GiB and this machine {machine_memory() / 2**30:.1f} GiB of "
            "memory: read it on a larger one"
        )
    safetensors = start[8:] == b"{"  # its header is JSON after eight bytes of length, which may look like a pickle
    if start[:2] == b"PK" and (names := _arrays_in(path)):
        return _read_npz(path, names)
    if not safetensors and (start[:2] == b"PK" or start[:1] == b"\x80"):
        return _tensors_in(_read_torch(path), path)
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"checkpoint '{path}' is neither a readable safetensors file nor a PyTorch state dict "
            f"({summary_of(error)}): it may be truncated, copy it again"
        ) from error


def _arrays_in(path: Path) -> list[str]:
    """Names of the arrays of an npz file, in their order; none of a PyTorch file or a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return []
    return [name.removesuffix(".npy") for name in names] if all(name.endswith(".npy") for name in names) else []


def _read_npz(path: Path, names: list[str]) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in names}
    except (*TORCH_ERRORS, zipfile.BadZipFile, zlib.error, NotImplementedError, MemoryError) as error:
        raise ModelError(
            f"checkpoint '{path}' is an npz file with objects beside numbers, or damaged ({summary_of(error)}): "
            "save arrays of numbers only"
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"checkpoint '{path}' contains code or objects beside tensors and is not loaded: where you trust it, "
            "save torch.save(model.state_dict(), ...) or a safetensors file instead"
        ) from error
    except TORCH_ERRORS as error:
        raise ModelError(
            f"checkpoint '{path}' cannot be read ({summary_of(error)}): it may be truncated or no state dict, "
            "copy or save it again"
        ) from error


def _tensors_in(content: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ModelError(f"checkpoint '{path}' holds {type(content).__name__}, expected a state dict of named tensors")
    others = [name for name, value in content.items() if not isinstance(value, Tensor) or not isinstance(name, str)]
    if others or not content:
        found = f"'{others[0]}' is no tensor" if others else "it is empty"
        raise ModelError(f"checkpoint '{path}' is no state dict ({found}): save torch.save(model.state_dict(), ...)")
    return dict(content)


def apply_state(model: GlobalModel, tensors: Tensors, source: str) -> GlobalModel:
    """The model with these tensors in place of its own, in its own precision; `source` names them in errors."""
    expected = _state_names(model)
    found = _canonical(tensors, model, expected, source)
    missing = [f"'{name}' is missing" for name in expected if name not in found and name not in model.counters]
    unknown = [f"'{name}' is unknown here" for name in found if name not in expected]
    shapes = [
        f"'{name}' is {tuple(found[name].shape)} there and {tuple(expected[name].shape)} here"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    problems = [*shapes, *missing[:1], *unknown[:1], *missing[1:], *unknown[1:]]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(
            f"{source} does not fit model '{model.name}': {'; '.join(problems[:3])}{more}: "
            "name the model that it was saved from, with the same number of channels and classes"
        )
    broken = [name for name, tensor in found.items() if not is_finite(tensor.float())]
    if broken:
        raise ModelError(f"{source}: '{broken[0]}' holds numbers that are not finite: use a checkpoint from before")

    def chosen(current: Tensors) -> dict[str, Tensor]:
        return {name: found.get(name, tensor).to(tensor.dtype, copy=True) for name, tensor in current.items()}

    return replace(
        model,
        parameters=chosen(model.parameters),
        buffers=chosen(model.buffers),
        counters=chosen(model.counters),
        constants=chosen(model.constants),
    )


def matched_state(model: GlobalModel, tensors: Tensors, source: str) -> dict[str, Tensor]:
    """These tensors under the model's names; some may be missing. `source` names them in errors.

    Arrays that are numbered instead of named (`0`, `1`, ...), as lists of NumPy arrays are sent, are taken in the order
    of the model's state dict; then all must be there. Raises `ModelError` for names and shapes that the model does not
    have.
    """
    expected = _state_names(model)
    if tensors and all(name.isdecimal() for name in tensors):
        order = [name for name in model.module.state_dict() if name in expected]
        if len(order) != len(tensors):
            raise ModelError(
                f"{source} holds {len(tensors)} numbered arrays, but model '{model.name}' has {len(order)} tensors: "
                "record arrays by name (the state dict), or name the model that they belong to"
            )
        tensors = {order[int(name)]: tensor for name, tensor in tensors.items() if int(name) < len(order)}
    found = _canonical(tensors, model, expected, source)
    for name, tensor in found.items():
        if name not in expected:
            raise ModelError(
                f"{source}: model '{model.name}' has no tensor '{name}': name the model that it belongs to"
            )
        if tensor.shape != expected[name].shape:
            raise ModelError(
                f"{source}: '{name}' is {tuple(tensor.shape)} there and {tuple(expected[name].shape)} in model "
                f"'{model.name}': name the model that it belongs to, with the same channels and classes"
            )
    return found


def _state_names(model: GlobalModel) -> dict[str, Tensor]:
    """What belongs in the model's state dict, frozen parameters included."""
    kept = set(model.module.state_dict(keep_vars=True))
    everything = {**model.parameters, **model.buffers, **model.counters, **model.constants}
    return {name: tensor for name, tensor in everything.items() if name in kept}


def _canonical(tensors: Tensors, model: GlobalModel, expected: Tensors, source: str) -> dict[str, Tensor]:
    """Tensors under the model's names: prefixes stripped or added, second names of tied tensors resolved."""
    aliases = tied_names(model)
    known = set(expected) | set(aliases)
    candidates = [dict(tensors)]
    for _ in range(3):
        latest = candidates[-1]
        for prefix in PREFIXES:
            if all(name.startswith(prefix) for name in latest):
                candidates.append({name.removeprefix(prefix): tensor for name, tensor in latest.items()})
                break
    if any(name.startswith("body.") for name in known):
        candidates += [{f"body.{name}": tensor for name, tensor in given.items()} for given in list(candidates)]
    best = max(candidates, key=lambda given: sum(name in known for name in given))
    resolved: dict[str, Tensor] = {}
    for name, tensor in best.items():
        target = aliases.get(name, name)
        if target in resolved and not torch.equal(resolved[target], tensor):
            raise ModelError(f"{source}: '{name}' and '{target}' differ there, but model '{model.name}' ties them")
        resolved[target] = tensor
    return resolved


def tied_names(model: GlobalModel) -> dict[str, str]:
    """Second names of tensors that have several, each with the name under which the model keeps the tensor."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.module.state_dict(keep_vars=True).items():
        known = first.setdefault(id(tensor), name)
        if known != name:
            aliases[name] = known
    return aliases


def fingerprint(model: GlobalModel) -> str:
    """Sixteen hexadecimal digits that identify the model's name, tensor names, shapes and values."""
    digest = hashlib.sha256(model.name.encode())
    for group in (model.parameters, model.buffers, model.counters, model.constants):
        for name, tensor in group.items():
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_model(model: GlobalModel, path: Path, *, key: str) -> None:
    """Writes the model's tensors as private safetensors (mode 0600), atomically. `key` says what they were computed from.

    Raises `StoreError` where the file cannot be written.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _state_names(model).items()}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={"format": "pt", "medpfl_key": key})
        partial.chmod(0o600)
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise StoreError(
            f"{path}: the trained model cannot be written ({summary_of(error)}); make room and try again"
        ) from error


def load_model(model: GlobalModel, path: Path, *, key: str) -> GlobalModel:
    """The model with what `save_model` wrote under the same key; raises `ModelError` if it is another or damaged."""
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("medpfl_key")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"cached model '{path}' cannot be read ({summary_of(error)}): delete it") from error
    if found != key:
        raise ModelError(f"cached model '{path}' belongs to {found}, expected {key}: delete it")
    return apply_state(model, read_tensors(path), f"cached model '{path}'")

"""A device that is the CPU in disguise: real numbers, but an error wherever tensors of two devices meet.

Code that runs on it, with the results that it has on the CPU, creates every tensor on the device of the tensors at
hand. It also counts how often the host waits for the device. No GPU is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")
DEVICE = torch.device("meta")
"""PyTorch differentiates on it in every installation; its tensors have no numbers of their own."""

_READS = {"_local_scalar_dense", "nonzero", "equal", "unique2", "_unique2", "masked_select"}
_COPIES = {"copy_", "_to_copy"}

_waits: list[str] = []


class Pretended(Tensor):
    """A tensor on the pretended device; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        result: Pretended = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        result.held = held
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


def _is_pretended(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    pretended = [value for value in flat if isinstance(value, Pretended)]
    others = [value for value in flat if not isinstance(value, Pretended)]
    name, target = func.overloadpacket.__name__, kwargs.get("device")
    onto = bool(pretended) if target is None else _is_pretended(target)
    if name == "copy_":
        onto = isinstance(args[0], Pretended)
    if pretended and any(other.dim() > 0 for other in others) and name not in _COPIES:
        raise RuntimeError(f"{func}: tensors on two devices")
    if (pretended and name in _READS) or (name in _COPIES and flat and bool(others if onto else pretended)):
        _waits.append(name)
    if target is not None:
        kwargs = {**kwargs, "device": CPU}
    plain_args, plain_kwargs = tree_map(lambda one: one.held if isinstance(one, Pretended) else one, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if torch.Tag.inplace_view in func.tags:
        with no_dispatch():
            func(*args, **kwargs)
    if not onto:
        return result
    disguises = {id(one.held): one for one in pretended}

    def disguised(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        return disguises[id(one)] if id(one) in disguises else Pretended(one)

    return tree_map(disguised, result)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """New tensors that are asked for on the pretended device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(one, Pretended) for one in types) or _is_pretended(kwargs.get("device")):
            return _computed(func, args, kwargs)
        return func(*args, **kwargs)


class _Literals(TorchFunctionMode):
    """From and to Python's numbers, which does not come by there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and _is_pretended(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.new_tensor and isinstance(args[0], Pretended):
            device = kwargs.pop("device", DEVICE)
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(device)
        if func is Tensor.tolist and isinstance(args[0], Pretended):
            _waits.append("tolist")
            return args[0].held.tolist()
        return func(*args, **kwargs)


@contextmanager
def pretended_device() -> Iterator[list[str]]:
    """Inside, tensors can be put on `DEVICE`. The value lists the operations that made the host wait for it."""
    _waits.clear()
    with _Operations(), _Literals():  # type: ignore[no-untyped-call]
        yield _waits

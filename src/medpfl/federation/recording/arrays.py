"""Copies of whatever stands for a tensor in a message."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from medpfl.core.errors import DataError


def as_tensor(name: str, value: Any) -> Tensor:
    """A dense copy in memory, in its own type, of a tensor or of what NumPy makes an array of.

    Raises DataError that calls it `name` where there is none.

    >>> as_tensor("w", [1.0, 2.0])
    tensor([1., 2.], dtype=torch.float64)
    """
    try:
        if isinstance(value, Tensor):
            dense = value.detach() if value.layout == torch.strided else value.detach().to_dense()
            return dense.to("cpu", copy=True).contiguous()
        return torch.from_numpy(np.array(value, order="C", copy=True))
    except (TypeError, ValueError, RuntimeError) as error:  # NotImplementedError of meta tensors is a RuntimeError
        raise DataError(
            f"'{name}' is {type(value).__name__} that no tensor in memory can hold ({str(error).splitlines()[0]})"
        ) from None

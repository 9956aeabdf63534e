"""Thresholds that survive a client's half precision."""

from __future__ import annotations

import torch
from torch import Tensor

ROW_FACTORS = 128
"""Sizes of a row between two powers of two that are tried."""

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def rows_and_biases(edges: Tensor, inputs: int, scale: float, half: torch.dtype) -> tuple[Tensor, Tensor]:
    """Entries of constant rows (K,) near scale / inputs and biases (K,), all of them numbers of the type `half`.

    Unit k with row entries w and bias b is active for images whose mean value is above -b / (w * inputs). A half type
    has few numbers near any edge, so that neighboring edges of size scale would fall together; but the row's size is
    free, since no gradient depends on it: of all sizes between two powers of two, each unit gets the one whose bias is
    nearest to a number of the type. edges: (K,) float64.

    >>> edges = torch.linspace(0.5, 0.6, 100, dtype=torch.float64)
    >>> len((-0.01 * edges).bfloat16().unique())
    34
    >>> rows, biases = rows_and_biases(edges, 784, 0.01, torch.bfloat16)
    >>> len((-biases / (rows * 784)).unique())
    100
    """
    lowest = 2.0 ** float(torch.log2(torch.tensor(scale / inputs, dtype=torch.float64)).floor())
    factors = 1.0 + torch.arange(ROW_FACTORS, dtype=torch.float64, device=edges.device) / ROW_FACTORS
    rows = (lowest * factors).to(half).double().unique()
    biases = -(edges.double()[:, None] * rows * inputs).to(half).double()
    missed = (biases / (rows * inputs) + edges[:, None]).abs()
    nearest = missed.argmin(dim=1)
    return rows[nearest], biases.gather(1, nearest[:, None])[:, 0]

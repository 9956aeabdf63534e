"""The arithmetic of aggregates: means over clients, and integers as secure aggregation sums them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from medpfl.core.domain import Tensors, Update

TensorSum = dict[str, dict[str, Tensor]]
"""Part of an update (`trainable`, `buffers`, `counters`) -> name -> sum over clients."""

PARTS = ("trainable", "buffers", "counters")


def summed(
    updates: Iterable[Update], encode: Callable[[Tensor, Update], Tensor]
) -> tuple[TensorSum, Update, list[int]]:
    """The sum over clients of `encode(tensor, update)` for every tensor; the first update; all clients' examples.

    No update but the first is kept.
    """
    total: TensorSum = {}
    first: Update | None = None
    examples: list[int] = []
    for update in updates:
        first = first or update
        examples.append(update.examples)
        for part in PARTS:
            tensors: Mapping[str, Tensor] = getattr(update, part)
            sums = total.setdefault(part, {})
            for name, tensor in tensors.items():
                encoded = encode(tensor, update)
                sums[name] = sums[name] + encoded if name in sums else encoded
    if first is None:
        raise ValueError("an aggregate needs at least one update")
    return total, first, examples


def as_update(sums: TensorSum, decode: Callable[[Tensor], Tensor], like: Update, examples: int) -> Update:
    """The aggregate as an update of so many examples; counters become whole numbers again, all else is float64."""

    def decoded(part: str) -> Tensors:
        return {name: decode(tensor) for name, tensor in sums[part].items()}

    counters = {
        name: tensor.round().to(like.counters[name].dtype) if not like.counters[name].is_floating_point() else tensor
        for name, tensor in decoded("counters").items()
    }
    return replace(
        like, trainable=decoded("trainable"), buffers=decoded("buffers"), counters=counters, examples=examples
    )


def stochastically_rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """Whole numbers (int64), each one of the two neighbors of its value, so that the mean is the value.

    >>> stochastically_rounded(torch.tensor([3.0, -2.0]), torch.Generator()).tolist()
    [3, -2]
    """
    above = values.ceil()
    draws = torch.rand(values.shape, dtype=torch.float64, generator=generator).to(values.device)
    down = draws < above.double() - values.double()
    return above.to(torch.int64) - down.to(torch.int64)

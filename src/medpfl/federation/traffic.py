"""How many bytes an update takes, in the plainest code that its defense allows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from medpfl.core.domain import Tensors, Update
from medpfl.core.mechanisms import (
    Composed,
    ErrorFeedback,
    GaussianNoise,
    LaplaceNoise,
    LowRank,
    Mechanism,
    Pruned,
    Quantized,
    RandomK,
    Signs,
    TopK,
)

FLOAT = 32
"""Bits of a number that is sent as it is."""

INDEX = 32
"""Bits of a place."""

SEED = 64
"""Bits of the seed from which the receiver draws the places of random entries."""


@dataclass(frozen=True)
class Code:
    """How tensors are written: what all parts of a defense together allow.

    places: all entries are written, or those that are not zero, with their places as a `list` or a map of bits, whichever
    is shorter, or drawn from a `seed`. bits: per written entry. block: written entries that share a 32-bit scale, 0 where
    a tensor has one, None where there is none. ternary: entries are signs, which take a bit more where some are zero and
    all are written. low_rank: factors are written in place of matrices.
    """

    places: Literal["all", "list", "seed"] = "all"
    bits: float = FLOAT
    block: int | None = None
    ternary: bool = False
    low_rank: LowRank | None = None

    def bits_of(self, tensor: Tensor) -> int:
        """Bits of one tensor."""
        if self.low_rank is not None and self.low_rank.applies(tensor.shape):
            rows = tensor.shape[0]
            return FLOAT * min(self.low_rank.rank, rows) * (rows + tensor.numel() // rows)
        entries, written = tensor.numel(), tensor.numel()
        places = 0
        if self.places != "all":
            written = int(tensor.count_nonzero())
            places = SEED if self.places == "seed" else min(INDEX * written, entries)
        each = 1 + int(bool((tensor == 0).any())) if self.ternary and self.places == "all" else self.bits
        scales = 0 if self.block is None else math.ceil(written / (self.block or max(written, 1)))
        return min(places + math.ceil(each * written) + FLOAT * scales, FLOAT * entries)


def bytes_sent(update: Update, mechanism: Mechanism) -> int:
    """Bytes of an update behind a defense: 32-bit numbers, or what the defense lets a client write in their place.

    Top-k and pruning: values with a list or a map of their places. Random-k: values and one seed for each tensor. Signs: a bit each (two
    where some are zero) and a scale for each tensor. Quantization: the bits of a level, and a scale per block. Low rank:
    both factors. Buffers as 32-bit numbers, counters in their own integers. Names, shapes and entropy coding do not count.

    >>> import torch
    >>> update = Update("gradient", {"weight": torch.tensor([0.0, 0.0, 3.0, 0.0])}, {}, {}, 1)
    >>> bytes_sent(update, Mechanism()), bytes_sent(update, TopK(0.25))
    (16, 5)
    """
    code = _after(Code(), mechanism)
    tensors = sum(math.ceil(code.bits_of(tensor) / 8) for tensor in update.trainable.values())
    return tensors + _plain(update.buffers, FLOAT // 8) + _plain(update.counters)


def _plain(tensors: Tensors, size: int | None = None) -> int:
    return sum(tensor.numel() * (size or tensor.element_size()) for tensor in tensors.values())


def _after(code: Code, mechanism: Mechanism) -> Code:
    """What a part of a defense makes of the code so far."""
    if isinstance(mechanism, Composed):
        for part in mechanism.parts:
            code = _after(code, part)
        return code
    if isinstance(mechanism, ErrorFeedback):
        return _after(code, mechanism.part)
    if isinstance(mechanism, TopK | Pruned):
        return replace(code, places="list", low_rank=None)
    if isinstance(mechanism, RandomK):
        return replace(code, places="seed" if code.places == "all" else code.places, low_rank=None)
    if isinstance(mechanism, Signs):
        return Code(code.places, 1, 0 if mechanism.scaled else None, ternary=True)
    if isinstance(mechanism, Quantized):
        return Code(code.places, math.log2(2 * mechanism.levels + 2), mechanism.block or 0)
    if isinstance(mechanism, LowRank):
        return Code(low_rank=mechanism)
    if isinstance(mechanism, LaplaceNoise | GaussianNoise):
        return Code()
    return code

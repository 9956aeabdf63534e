"""Full batches of candidates through `torch.compile`, the rest as they are."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from medpfl.attacks.matching.layout import CANNOT, BatchedObjective, once_per_batch
from medpfl.attacks.matching.problem import Problem

COMPILED_AT_ONCE = 64
"""Candidates of one compiled batch; its shapes are fixed, so fewer run uncompiled."""

WORTHWHILE = 400_000
"""Evaluations of single candidates that amortize compiling: a LeNet saves 0.1 ms each, and 10 to 30 s compile it."""


def worth_compiling(evaluations: int, problem: Problem) -> bool:
    """Whether a search of so many evaluations in all saves more time than compiling takes.

    Measured where all victims share a model, one gradient is matched, and arithmetic is in float32.
    """
    plain = problem.shared and problem.simulate is None and problem.dtype == torch.float32
    return plain and evaluations >= WORTHWHILE


def compiler_missing() -> bool:
    """Whether no C++ compiler is found, which is said (Python shows the same warning once)."""
    if shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++"):
        return False
    warnings.warn("found no C++ compiler, so matching runs uncompiled: install g++ to speed it up", stacklevel=2)
    return True


def compiled_objective(
    eager: BatchedObjective,
    mapped: Callable[..., tuple[Tensor, Tensor]],
    choose: Callable[[Tensor], tuple[object, ...]],
) -> BatchedObjective:
    """Batches of `COMPILED_AT_ONCE` candidates run compiled, what is left over runs through `eager`.

    mapped: variables and what `choose` gives for their victims -> derivatives and values. Where compiling fails, all
    runs through `eager`, and this is said once.
    """

    def whole(variables: Tensor, *batch: object) -> tuple[Tensor, Tensor]:
        return mapped(variables, *batch)

    fast = torch.compile(whole, dynamic=False, fullgraph=True)
    failed: list[str] = []

    @once_per_batch
    def chosen(victims: Tensor) -> tuple[list[tuple[object, ...]], Tensor]:
        full = len(victims) // COMPILED_AT_ONCE * COMPILED_AT_ONCE
        batches = torch.split(victims[:full], COMPILED_AT_ONCE) if full else ()
        return [choose(batch) for batch in batches], victims[full:]

    def objective(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        if failed or len(victims) < COMPILED_AT_ONCE:
            return eager(variables, victims)
        batches, rest = chosen(victims)
        values, derivatives = [], []
        try:
            for place, batch in enumerate(batches):
                rows = variables[place * COMPILED_AT_ONCE : (place + 1) * COMPILED_AT_ONCE]
                derivative, value = fast(rows.detach(), *batch)
                values.append(value.detach())
                derivatives.append(derivative.detach())
        except CANNOT as error:
            failed.append(str(error))
            warnings.warn(f"matching runs uncompiled: {failed[0].partition(chr(10))[0][:200]}", stacklevel=2)
            return eager(variables, victims)
        if len(rest):
            value, derivative = eager(variables[len(victims) - len(rest) :], rest)
            values.append(value)
            derivatives.append(derivative)
        return torch.cat(values), torch.cat(derivatives)

    return objective

"""A search in stages: each adds a term of its own to the objective and starts where the one before ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from medpfl.attacks.matching.engine import Found
from medpfl.attacks.matching.layout import BatchedObjective


def added(objective: BatchedObjective, term: BatchedObjective | None) -> BatchedObjective:
    """The sum of two objectives."""
    if term is None:
        return objective

    def summed(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        values, derivatives = objective(variables, victims)
        more, slopes = term(variables, victims)
        return values + more, derivatives + slopes

    return summed


def continued(before: Sequence[Found] | None, now: Sequence[Found]) -> list[Found]:
    """What a stage found, with the evaluations of the stages before it."""
    if before is None:
        return list(now)
    return [
        replace(
            one,
            evaluations=one.evaluations + earlier.evaluations,
            trace=tuple((earlier.evaluations + at, value) for at, value in one.trace),
            restarts=earlier.restarts,
        )
        for earlier, one in zip(before, now, strict=True)
    ]

"""What solvers share: their state as named tensors with candidates in front, and why a candidate ended."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from medpfl.attacks.matching.gradients import BatchedObjective

SolverState = dict[str, Tensor]
"""Tensors whose leading dimension counts candidates. All hold at least `victims`, `goals`, `point`,
`best_point`, `best_value`, `evaluations` and `status`."""

RUNNING, SPENT, STALLED, STATIONARY, SOLVED, DIVERGED = range(6)

STOP_REASONS = {
    SPENT: "all iterations done",
    STALLED: "stalled: the objective stopped decreasing",
    STATIONARY: "stalled: the gradient of the objective is zero",
    SOLVED: "solved: the objective fell below its goal",
    DIVERGED: "diverged: the next iterate was not finite",
}
"""Sentences for `Reconstruction.stop_reason`."""


class Solver(Protocol):
    """Minimizes a batched objective for many candidates at once; all settings frozen, all state in the state."""

    @property
    def evaluations(self) -> int:
        """Upper bound on evaluations of one candidate."""

    @property
    def block(self) -> int:
        """Evaluations of one candidate per `advance`."""

    def start(self, objective: BatchedObjective, variables: Tensor, victims: Tensor, goals: Tensor) -> SolverState:
        """The state at the starting points (A, n)."""

    def advance(self, objective: BatchedObjective, state: SolverState) -> SolverState:
        """The state after some evaluations; candidates that have ended stay as they are."""


def select(state: SolverState, rows: Tensor) -> SolverState:
    """Only the given candidates."""
    return {name: tensor[rows] for name, tensor in state.items()}


def running(state: SolverState) -> Tensor:
    """Candidates that have not ended, as indices."""
    return torch.nonzero(state["status"] == RUNNING).flatten()

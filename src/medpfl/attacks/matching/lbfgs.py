"""Batched L-BFGS: every candidate has its own history, step length, line search and end.

One evaluation of the batched objective serves each candidate's own state: some accept a step and take a new
direction, others shorten or lengthen a trial step. Nothing depends on companions but rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from medpfl.attacks.matching.gradients import BatchedObjective
from medpfl.attacks.matching.states import DIVERGED, RUNNING, SOLVED, SPENT, STALLED, STATIONARY, SolverState

LineSearch = Literal["none", "armijo", "wolfe"]

Preconditioner = Callable[[Tensor, Tensor], Tensor]
"""Gradients (A, n) and the victim of each row (A,) -> an estimated inverse Hessian times each gradient (A, n).

Linear in the gradients, symmetric and positive definite for each victim.
"""

SUFFICIENT_DECREASE = 1e-4
CURVATURE = 0.9
LONGEST_SEARCH = 25
"""Trial steps of one line search; after them the history is dropped once, then the candidate has stalled."""

FLAT = 1e-10
"""Pairs whose curvature, relative to the lengths of both parts, is below this are not remembered."""


@dataclass(frozen=True)
class LBFGS:
    """Settings of the batched L-BFGS (Nocedal and Wright, algorithm 7.5).

    iterations: accepted steps at most. history: remembered pairs per candidate. line_search: `none` takes the unit
    step always (as `torch.optim.LBFGS` does by default, the first step scaled by the gradient's 1-norm), `armijo`
    backtracks, `wolfe` bisects towards the weak Wolfe conditions (Lewis and Overton 2013). patience and
    smallest_decrease: a candidate whose objective fell by less than this share over so many steps has stalled.
    block: evaluations between two looks at who has finished. preconditioner: an estimate of the inverse Hessian to
    start from (and to go back to whenever the history is dropped), with unit steps, instead of a multiple of the
    identity with short ones.
    """

    iterations: int
    history: int = 20
    line_search: LineSearch = "wolfe"
    patience: int = 100
    smallest_decrease: float = 1e-3
    block: int = 10
    preconditioner: Preconditioner | None = None

    @property
    def evaluations(self) -> int:
        """Upper bound on evaluations of one candidate."""
        return self.iterations + 1 if self.line_search == "none" else ceil(1.25 * self.iterations) + 1

    def start(self, objective: BatchedObjective, variables: Tensor, victims: Tensor, goals: Tensor) -> SolverState:
        """Evaluates the starting points (A, n); a candidate is solved once its objective is at most its goal (A,)."""
        value, gradient = objective(variables, victims)
        finite = _finite(value, gradient)
        gradient = torch.where(finite[:, None], gradient, 0.0)
        count, size = variables.shape
        zeros, history = torch.zeros_like(value), variables.new_zeros(count, self.history, size)
        whole = torch.zeros_like(victims)
        state = {
            "victims": victims,
            "goals": goals,
            "point": variables,
            "value": torch.where(finite, value, torch.inf),
            "gradient": gradient,
            "scaled": self._scaled(gradient, victims),
            "best_point": variables,
            "best_value": torch.where(finite, value, torch.inf),
            "direction": torch.zeros_like(variables),
            "slope": zeros,
            "step": zeros,
            "lower": zeros,
            "upper": torch.full_like(zeros, torch.inf),
            "trials": whole,
            "steps": history,
            "changes": history.clone(),
            "cross": variables.new_zeros(count, self.history, self.history),
            "square": variables.new_zeros(count, self.history, self.history),
            "scale": torch.ones_like(zeros),
            "head": whole,
            "known": whole,
            "iterations": whole,
            "evaluations": whole + 1,
            "plateau_value": torch.where(finite, value, torch.inf),
            "plateau_iteration": whole,
            "status": torch.where(finite, RUNNING, DIVERGED),
        }
        everyone = torch.ones_like(finite)
        return self._aim(state, everyone, everyone, filled=0)

    def advance(self, objective: BatchedObjective, state: SolverState) -> SolverState:
        """`block` evaluations for every candidate of the state."""
        known = int(state["known"].max())
        for extra in range(self.block):
            state = self._evaluate(objective, state, filled=min(self.history, known + extra + 1))
        return state

    def _evaluate(self, objective: BatchedObjective, old: SolverState, filled: int) -> SolverState:
        running = old["status"] == RUNNING
        step = old["step"]
        trial = torch.where(running[:, None], old["point"] + step[:, None] * old["direction"], old["point"])
        value, gradient = objective(trial, old["victims"])
        finite = _finite(value, gradient)
        value = torch.where(finite, value, torch.inf)
        gradient = torch.where(finite[:, None], gradient, 0.0)
        scaled = self._scaled(gradient, old["victims"])
        slope = (gradient * old["direction"]).sum(dim=1)
        decreased = finite & (value <= old["value"] + SUFFICIENT_DECREASE * step * old["slope"])
        flat_enough = slope >= CURVATURE * old["slope"]
        trials = old["trials"] + 1
        if self.line_search == "none":
            accept = running & finite
        elif self.line_search == "armijo":
            accept = running & decreased
        else:
            accept = running & decreased & (flat_enough | (trials >= LONGEST_SEARCH))
        new = dict(old)
        new["evaluations"] = old["evaluations"] + running
        new["trials"] = torch.where(accept, 0, trials)
        new.update(self._bracket(old, decreased, value, slope))
        better = accept & (value < old["best_value"])
        new["best_value"] = torch.where(better, value, old["best_value"])
        new["best_point"] = torch.where(better[:, None], trial, old["best_point"])
        self._remember(old, new, accept, trial - old["point"], gradient - old["gradient"], scaled - old["scaled"])
        new["point"] = torch.where(accept[:, None], trial, old["point"])
        new["value"] = torch.where(accept, value, old["value"])
        new["gradient"] = torch.where(accept[:, None], gradient, old["gradient"])
        new["scaled"] = torch.where(accept[:, None], scaled, old["scaled"])
        new["iterations"] = old["iterations"] + accept
        exhausted = running & ~accept & (new["trials"] >= LONGEST_SEARCH)
        stuck = exhausted & (new["known"] == 0)
        new["known"] = torch.where(exhausted, 0, new["known"])
        self._judge(new, running, finite, stuck)
        return self._aim(new, accept | exhausted, exhausted, filled)

    def _bracket(self, old: Mapping[str, Tensor], decreased: Tensor, value: Tensor, slope: Tensor) -> dict[str, Tensor]:
        """The interval that holds a good step, and the next trial inside it."""
        step, upper = old["step"], torch.where(decreased, old["upper"], old["step"])
        lower = torch.where(decreased, old["step"], old["lower"])
        curve = value - old["value"] - step * old["slope"]
        parabola = -0.5 * old["slope"] * step.square() / curve
        inside = torch.isfinite(parabola) & (parabola > lower + 0.1 * (upper - lower)) & (parabola < 0.6 * upper)
        bisected = torch.where(torch.isfinite(value), 0.5 * (lower + upper), lower + 0.1 * (upper - lower))
        shorter = torch.where(inside & ~decreased, parabola, bisected)
        return {
            "lower": lower,
            "upper": upper,
            "step": torch.where(torch.isfinite(upper), shorter, 2.0 * lower),
        }

    def _scaled(self, gradient: Tensor, victims: Tensor) -> Tensor:
        """The preconditioned gradient, the gradient itself without a preconditioner."""
        return gradient if self.preconditioner is None else self.preconditioner(gradient, victims)

    def _remember(
        self,
        old: Mapping[str, Tensor],
        new: dict[str, Tensor],
        accept: Tensor,
        step: Tensor,
        change: Tensor,
        scaled: Tensor,
    ) -> None:
        """Stores the step and the preconditioned change of the gradient of every candidate that moved and met
        positive curvature.

        The history and its inner products are written in place; every state owns its own.
        """
        product = (step * change).sum(dim=1)
        positive = product > FLAT * (step.square().sum(dim=1) * change.square().sum(dim=1)).sqrt()
        keep = accept & positive & torch.isfinite(product)
        place, rows = old["head"], torch.arange(len(keep), device=keep.device)
        new["head"] = torch.where(keep, (place + 1) % self.history, place)
        new["known"] = torch.where(keep, (old["known"] + 1).clamp_max(self.history), old["known"])
        new["scale"] = torch.where(keep, product / (scaled * change).sum(dim=1), old["scale"])

        def store(history: Tensor, at: tuple[Tensor | slice, ...], values: Tensor) -> None:
            history[at] = torch.where(keep[:, None], values, history[at])

        everything = slice(None)
        store(old["steps"], (rows, place), step)
        store(old["changes"], (rows, place), scaled)
        store(old["cross"], (rows, everything, place), _products(old["steps"], change))
        overlap = _products(old["changes"], change)
        store(old["square"], (rows, everything, place), overlap)
        store(old["square"], (rows, place), overlap)

    def _judge(self, new: dict[str, Tensor], running: Tensor, finite: Tensor, stuck: Tensor) -> None:
        """Ends candidates that are solved, stationary, stalled, out of budget or diverged."""
        due = new["iterations"] - new["plateau_iteration"] >= self.patience
        flat = due & (new["best_value"] > (1.0 - self.smallest_decrease) * new["plateau_value"])
        new["plateau_value"] = torch.where(due, new["best_value"], new["plateau_value"])
        new["plateau_iteration"] = torch.where(due, new["iterations"], new["plateau_iteration"])
        spent = (new["iterations"] >= self.iterations) | (new["evaluations"] >= self.evaluations)
        status = new["status"]
        for ended, code in (
            (spent, SPENT),
            (flat | stuck, STALLED),
            ((new["gradient"] == 0).all(dim=1), STATIONARY),
            (new["best_value"] <= new["goals"], SOLVED),
        ):
            status = torch.where(running & ended, code, status)
        if self.line_search == "none":
            status = torch.where(running & ~finite, DIVERGED, status)
        new["status"] = status

    def _aim(self, state: SolverState, changed: Tensor, restart: Tensor, filled: int) -> SolverState:
        """A new direction and first trial step for the candidates that moved, along the gradient after a restart."""
        gradient, scaled = state["gradient"], state["scaled"]
        direction = self._quasi_newton(state, filled)
        slope = (gradient * direction).sum(dim=1)
        downhill = restart | (state["known"] == 0) | ~(slope < 0)
        direction = torch.where(downhill[:, None], -scaled, direction)
        slope = torch.where(downhill, -(gradient * scaled).sum(dim=1), slope)
        step = torch.ones_like(slope)
        if self.preconditioner is None:
            first = (1.0 / gradient.abs().sum(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)).clamp_max(1.0)
            step = torch.where(downhill, first, step)
        new = dict(state)
        new["known"] = torch.where(changed & downhill, 0, state["known"])
        new["direction"] = torch.where(changed[:, None], direction, state["direction"])
        new["slope"] = torch.where(changed, slope, state["slope"])
        new["step"] = torch.where(changed, step, state["step"])
        new["lower"] = torch.where(changed, 0.0, state["lower"])
        new["upper"] = torch.where(changed, torch.inf, state["upper"])
        new["trials"] = torch.where(changed, 0, state["trials"])
        return new

    def _quasi_newton(self, state: Mapping[str, Tensor], filled: int) -> Tensor:
        """Minus the inverse Hessian estimate times the gradient, for at most `filled` remembered pairs.

        The compact form (Byrd, Nocedal, Schnabel 1994, section 3) with S, Y the pairs from old to new, R the upper
        triangle of S Y', D its diagonal, c the scale and P the preconditioner: a = R^-1 S g,
        w = R'^-1 (D a - c (Y P g - Y P Y' a)), and the product is c P (g - Y' a) + S' w. What is stored of Y is Y P.
        Places without a pair have zero products and a one on the diagonal.
        """
        gradient, scale = state["gradient"], state["scale"][:, None]
        if filled == 0:
            return -state["scaled"]
        ages = torch.arange(filled - 1, -1, -1, device=gradient.device)
        places = (state["head"][:, None] - 1 - ages) % self.history
        empty = ages >= state["known"][:, None]
        rows = torch.arange(len(places), device=gradient.device)[:, None]
        both = empty[:, :, None] | empty[:, None, :]
        cross = state["cross"][rows[:, :, None], places[:, :, None], places[:, None, :]].masked_fill(both, 0.0)
        square = state["square"][rows[:, :, None], places[:, :, None], places[:, None, :]].masked_fill(both, 0.0)
        diagonal = cross.diagonal(dim1=1, dim2=2).masked_fill(empty, 1.0)
        triangle = cross.triu(1) + torch.diag_embed(diagonal)
        along = _products(state["steps"], gradient)[rows, places].masked_fill(empty, 0.0)
        across = _products(state["changes"], gradient)[rows, places].masked_fill(empty, 0.0)
        first = torch.linalg.solve_triangular(triangle, along[:, :, None], upper=True)
        rest = diagonal[:, :, None] * first - scale[:, :, None] * (across[:, :, None] - square @ first)
        second = torch.linalg.solve_triangular(triangle.transpose(1, 2), rest, upper=False)
        blank = gradient.new_zeros(len(places), self.history)
        back = _combination(state["changes"], blank.scatter(1, places, first[:, :, 0]))
        forth = _combination(state["steps"], blank.scatter(1, places, second[:, :, 0]))
        return -(scale * (state["scaled"] - back) + forth)


def _products(history: Tensor, vector: Tensor) -> Tensor:
    """Inner products of all remembered vectors (A, m, n) with one vector per candidate (A, n): (A, m)."""
    return torch.bmm(history, vector[:, :, None])[:, :, 0]


def _combination(history: Tensor, factors: Tensor) -> Tensor:
    """Sums of remembered vectors (A, m, n) with factors (A, m): (A, n)."""
    return torch.bmm(factors[:, None, :], history)[:, 0]


def _finite(value: Tensor, gradient: Tensor) -> Tensor:
    return torch.isfinite(value) & torch.isfinite(gradient).all(dim=1)

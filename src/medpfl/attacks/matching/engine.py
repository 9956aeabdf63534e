"""The one search loop: victims x restarts is the leading dimension, every step can be snapshotted and resumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from medpfl.attacks.matching.coupling import GroupConsistency
from medpfl.attacks.matching.gradients import BatchedObjective
from medpfl.attacks.matching.states import DIVERGED, RUNNING, SPENT, STOP_REASONS, Solver, SolverState, running, select
from medpfl.core.devices import CPU, moved
from medpfl.core.session import Session, State

TRACE_POINTS = 40
"""Points that a reported trace keeps at most."""

RECORDED_POINTS = 200
"""Points that a running trace holds before every other one is dropped."""


@dataclass(frozen=True)
class Found:
    """What a search found for one victim.

    variables: (n,) of the best restart. objective: its value, infinite if no iterate was finite. trace: (evaluations,
    best value so far) of that restart. evaluations: of all restarts. restarts: how many were run.
    """

    variables: Tensor
    objective: float
    trace: tuple[tuple[int, float], ...]
    evaluations: int
    stop_reason: str
    restarts: int

    def in_units(self, unit: float) -> Found:
        """The same with objective and trace multiplied by `unit`."""
        trace = tuple((evaluations, unit * value) for evaluations, value in self.trace)
        return replace(self, objective=unit * self.objective, trace=trace)


def search(
    objective: BatchedObjective,
    solver: Solver,
    starts: Callable[[], Tensor],
    goals: Tensor,
    *,
    restarts: int,
    retry_above: Tensor | None = None,
    coupling: GroupConsistency | None = None,
    generators: Sequence[torch.Generator],
    session: Session,
) -> list[Found]:
    """Minimizes `objective` for V victims from several starts each and keeps each victim's lowest value.

    starts: draws (V, restarts, n), called only at a fresh start. goals: (V,), at or below which a victim is solved.
    retry_above: (V,); the r-th restart runs only for victims that got stuck, that is, whose best objective is above
    this although iterations were left. None runs all restarts side by side. coupling: what pulls the restarts of a
    victim together; they must then run side by side. What is found lies on the CPU.
    The generators' states are part of a snapshot, so that a resumed search equals an uninterrupted one to the bit.
    """
    if coupling is not None and retry_above is not None:
        raise ValueError("coupled restarts run side by side, found retry_above")
    victims = len(goals)
    waves = restarts if retry_above is not None else 1
    saved = session.restore()
    if saved is None:
        progress: State = {"starts": starts(), "wave": 0, "solver": None, "ended": None, "trace": [], "waves": []}
    else:
        for generator, state in zip(generators, saved["generators"], strict=True):
            generator.set_state(state)
        progress = _copied(moved({name: part for name, part in saved.items() if name != "generators"}, goals.device))
    budget = solver.evaluations
    while progress["wave"] < waves:
        if progress["solver"] is None:
            _begin_wave(objective, solver, progress, goals, restarts, retry_above, coupling)
        while progress["solver"] is not None:
            _advance_wave(objective, solver, progress, coupling)
            done = progress["wave"] * budget + _most_evaluations(progress)
            session.checkpoint(done, waves * budget, lambda: _snapshot(progress, generators))
    return [_best(progress["waves"], victim) for victim in range(victims)]


def _begin_wave(
    objective: BatchedObjective,
    solver: Solver,
    progress: State,
    goals: Tensor,
    restarts: int,
    retry_above: Tensor | None,
    coupling: GroupConsistency | None,
) -> None:
    starts, wave = progress["starts"], progress["wave"]
    if retry_above is not None:
        best = [_best(progress["waves"], victim) for victim in range(len(goals))]
        stuck = [
            victim
            for victim, (one, bound) in enumerate(zip(best, retry_above.tolist(), strict=True))
            if one.objective > bound and one.stop_reason != STOP_REASONS[SPENT]
        ]
        victims = torch.tensor(stuck, dtype=torch.int64, device=goals.device)
        variables = starts[victims, wave]
    else:
        victims = torch.arange(len(goals), device=goals.device).repeat_interleave(restarts)
        variables = starts.flatten(0, 1)
    if not len(victims):
        progress["wave"] += 1
        return
    progress["active"] = torch.arange(len(victims), device=goals.device)
    if coupling is not None:
        unknown, everyone = goals.new_zeros(len(victims)), torch.ones_like(victims, dtype=torch.bool)
        progress["consensus"] = coupling.targets(variables, unknown, victims, everyone)
        objective = coupling.pull(objective, progress["consensus"])
    progress["solver"] = solver.start(objective, variables, victims, goals[victims])
    progress["ended"] = {
        "victims": victims,
        "point": variables,
        "best_point": variables,
        "best_value": progress["solver"]["best_value"],
        "evaluations": progress["solver"]["evaluations"],
        "status": progress["solver"]["status"],
    }
    progress["trace"] = []
    progress["every"] = 1
    progress["advances"] = 0


def _advance_wave(
    objective: BatchedObjective, solver: Solver, progress: State, coupling: GroupConsistency | None
) -> None:
    """One block of evaluations; then ended candidates leave the batch, and a consensus that is due is renewed."""
    if coupling is not None:
        objective = coupling.pull(objective, progress["consensus"][progress["active"]])
    state = solver.advance(objective, progress["solver"])
    ended: SolverState = dict(progress["ended"])
    for name in ("point", "best_point", "best_value", "evaluations", "status"):
        ended[name] = ended[name].index_copy(0, progress["active"], state[name])
    progress["ended"] = ended
    progress["advances"] += 1
    if progress["advances"] % progress["every"] == 0:
        progress["trace"] = [*progress["trace"], moved((ended["evaluations"], ended["best_value"]), CPU)]
        if len(progress["trace"]) > RECORDED_POINTS:
            progress["trace"] = progress["trace"][1::2]
            progress["every"] *= 2
    if coupling is not None and progress["advances"] * solver.block % coupling.every < solver.block:
        sound = (ended["status"] != DIVERGED) & torch.isfinite(ended["point"]).all(dim=1)
        progress["consensus"] = coupling.targets(ended["point"], ended["best_value"], ended["victims"], sound)
    remaining = running(state)
    if len(remaining) < len(progress["active"]):
        progress["active"] = progress["active"][remaining]
        state = select(state, remaining)
    progress["solver"] = state
    if not len(remaining):
        del ended["point"]
        progress["waves"] = [*progress["waves"], moved({**ended, "trace": progress["trace"]}, CPU)]
        progress["solver"], progress["wave"] = None, progress["wave"] + 1


def _most_evaluations(progress: State) -> int:
    return 0 if progress["solver"] is None else int(progress["solver"]["evaluations"].max())


def _snapshot(progress: State, generators: Sequence[torch.Generator]) -> State:
    return {**_copied(progress), "generators": [generator.get_state() for generator in generators]}


def _copied(value: Any) -> Any:
    """The same nested value with tensors of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item) for item in value]
    return value


def _best(waves: Sequence[SolverState | dict[str, Any]], victim: int) -> Found:
    """The victim's lowest value over all restarts, ties to the earlier one."""
    chosen: tuple[float, Any, int] | None = None
    evaluations, count = 0, 0
    for wave in waves:
        for row in torch.nonzero(wave["victims"] == victim).flatten().tolist():
            value = float(wave["best_value"][row])
            evaluations += int(wave["evaluations"][row])
            count += 1
            if chosen is None or value < chosen[0]:
                chosen = (value, wave, row)
    if chosen is None:
        return Found(torch.empty(0), float("inf"), (), 0, "nothing was run", 0)
    value, wave, row = chosen
    status = int(wave["status"][row])
    assert status != RUNNING
    return Found(
        variables=wave["best_point"][row].cpu(),
        objective=value,
        trace=_thin([(int(counts[row]), float(values[row])) for counts, values in wave["trace"]]),
        evaluations=evaluations,
        stop_reason=STOP_REASONS[status],
        restarts=count,
    )


def _thin(points: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """At most `TRACE_POINTS` points, the last one always, repeats after the end left out."""
    distinct = [point for index, point in enumerate(points) if index == 0 or point != points[index - 1]]
    step = -(-len(distinct) // TRACE_POINTS) or 1
    return tuple(distinct[::-1][::step][::-1])

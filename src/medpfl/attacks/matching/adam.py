"""Batched Adam and signed Adam with step decay or warm-up and cosine, boxing, and noise (Geiping 2020, Yin 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Literal

import torch
from torch import Tensor

from medpfl.attacks.matching.gradients import BatchedObjective, Layout
from medpfl.attacks.matching.layout import once_per_batch
from medpfl.attacks.matching.priors import median_filter
from medpfl.attacks.matching.states import DIVERGED, RUNNING, SOLVED, SPENT, STALLED, SolverState
from medpfl.core.functional import per_channel

MILESTONES = (3 / 8, 5 / 8, 7 / 8)
"""Shares of the iterations after which the learning rate is divided by ten."""

Schedule = Literal["steps", "cosine", "constant"]

NoiseSource = Callable[[Tensor, int], Tensor]
"""Victims of the candidates (A,) in ascending order and entries n -> standard normal noise (A, n), in float64."""


def noise_of(generators: Sequence[torch.Generator]) -> NoiseSource:
    """Noise for every victim's candidates from the victim's own generator."""

    @once_per_batch
    def groups(victims: Tensor) -> list[tuple[int, int]]:
        present, counts = torch.unique_consecutive(victims, return_counts=True)
        return list(zip(present.tolist(), counts.tolist(), strict=True))

    def draw(victims: Tensor, size: int) -> Tensor:
        drawn = [(generators[owner], count) for owner, count in groups(victims)]
        rows = [torch.randn(count, size, generator=generator, dtype=torch.float64) for generator, count in drawn]
        return torch.cat(rows)

    return draw


@dataclass(frozen=True)
class Adam:
    """Settings of the batched Adam (Kingma and Ba 2015, betas 0.9 and 0.999).

    layout: where the images lie in the variables. scale: per channel, the unit of the learning rate in image units
    (the model's own normalization; ones without). signed: only the gradient's signs go in. schedule: the learning rate
    divided by ten at `MILESTONES` (`steps`), falling along half a cosine to zero (`cosine`), or constant; before, it
    rises linearly over `warm_up` iterations. noise: standard deviation of what is added to every step, as a share of
    the current learning rate (Langevin; Yin et al. 2021, section 3.5), drawn from `source`. boxed: images
    are kept in [0, 1]. median_filter_every: iterations between two median filters, 0 for none. patience: stop when the best objective has not fallen by a share of 1e-4 for so many
    iterations, 0 for never. block: evaluations between two looks at who has finished.
    """

    layout: Layout
    iterations: int
    learning_rate: float
    scale: tuple[float, ...]
    signed: bool = True
    schedule: Schedule = "steps"
    warm_up: int = 0
    noise: float = 0.0
    source: NoiseSource | None = None
    boxed: bool = True
    median_filter_every: int = 0
    patience: int = 0
    block: int = 10

    @property
    def evaluations(self) -> int:
        """Evaluations of one candidate: one per iteration and one of the last iterate."""
        return self.iterations + 1

    def start(self, objective: BatchedObjective, variables: Tensor, victims: Tensor, goals: Tensor) -> SolverState:
        """The state before the first evaluation at the starting points (A, n)."""
        infinite = variables.new_full((len(variables),), torch.inf)
        whole = torch.zeros_like(victims)
        return {
            "victims": victims,
            "goals": goals,
            "point": variables,
            "first": torch.zeros_like(variables),
            "second": torch.zeros_like(variables),
            "best_point": variables,
            "best_value": infinite,
            "plateau_value": infinite,
            "plateau_iteration": whole,
            "evaluations": whole,
            "status": whole + RUNNING,
        }

    def advance(self, objective: BatchedObjective, state: SolverState) -> SolverState:
        """Up to `block` iterations for every candidate of the state."""
        done = int(state["evaluations"].max())  # that of all who still run; from here on nothing is read back
        for count in range(done + 1, done + self.block + 1):
            state = self._iterate(objective, state, count)
        return state

    def _iterate(self, objective: BatchedObjective, old: SolverState, count: int) -> SolverState:
        """The iteration with this number, counted from 1, for all who still run."""
        running = old["status"] == RUNNING
        value, gradient = objective(old["point"], old["victims"])
        finite = torch.isfinite(value) & torch.isfinite(gradient).all(dim=1)
        new = dict(old)
        better = running & finite & (value < old["best_value"])
        new["best_value"] = torch.where(better, value, old["best_value"])
        new["best_point"] = torch.where(better[:, None], old["point"], old["best_point"])
        new["evaluations"] = old["evaluations"] + running
        self._judge(new, running, finite)
        moving = (new["status"] == RUNNING)[:, None]
        if self.signed:
            gradient = gradient.sign()
        first = 0.9 * old["first"] + 0.1 * gradient
        second = 0.999 * old["second"] + 0.001 * gradient.square()
        change = (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
        if self.noise and self.source is not None:
            change = change + self.noise * self.source(old["victims"], change.shape[1]).to(change)
        point = self._constrain(old["point"] - self._rate(count) * self._units(change) * change, count)
        for name, tensor in (("first", first), ("second", second), ("point", point)):
            new[name] = torch.where(moving, tensor, old[name])
        return new

    def _rate(self, count: int) -> float:
        """The learning rate of an iteration (counted from 1)."""
        factor = 1.0
        if self.schedule == "steps":
            factor = 0.1 ** sum(count > int(share * self.iterations) for share in MILESTONES)
        elif self.schedule == "cosine":
            falling = (count - self.warm_up) / max(1, self.iterations - self.warm_up)
            factor = 0.5 * (1.0 + cos(pi * min(max(falling, 0.0), 1.0)))
        if self.warm_up:
            factor *= min(count / self.warm_up, 1.0)
        return self.learning_rate * factor

    def _units(self, variables: Tensor) -> Tensor:
        """The unit of every entry of a candidate's variables (n,)."""
        shape = self.layout.images
        scale = per_channel(self.scale, self.layout.split(variables[0])[0]).expand(shape)
        return torch.cat([scale.reshape(-1), variables.new_ones(self.layout.size - self.layout.pixels)])

    def _constrain(self, variables: Tensor, count: int) -> Tensor:
        """Boxes the images, and median-filters them where this iteration is due."""
        images, _ = self.layout.split(variables)
        rest = variables[:, self.layout.pixels :]
        if self.boxed:
            images = images.clamp(0.0, 1.0)
        if self.median_filter_every and count % self.median_filter_every == 0:
            images = median_filter(images, len(self.layout.images) - 2)
        return torch.cat([images.reshape(len(variables), -1), rest], dim=1)

    def _judge(self, new: SolverState, running: Tensor, finite: Tensor) -> None:
        """Ends candidates that are solved, stalled, out of iterations or no longer finite."""
        status = new["status"]
        status = torch.where(running & (new["evaluations"] >= self.evaluations), SPENT, status)
        if self.patience:
            fell = new["best_value"] < new["plateau_value"] - 1e-4 * new["plateau_value"].abs().nan_to_num(posinf=0.0)
            new["plateau_value"] = torch.where(fell, new["best_value"], new["plateau_value"])
            new["plateau_iteration"] = torch.where(fell, new["evaluations"], new["plateau_iteration"])
            waited = new["evaluations"] - new["plateau_iteration"] >= self.patience
            status = torch.where(running & waited, STALLED, status)
        status = torch.where(running & (new["best_value"] <= new["goals"]), SOLVED, status)
        new["status"] = torch.where(running & ~finite, DIVERGED, status)

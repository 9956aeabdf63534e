"""The batched objective by ghost matching: candidates of one model run as one ordinary batch.

For a scalar J of the weight gradients g = dL/dW, the derivative of J in the images is that of <g, u> with u = dJ/dg
held fixed. J is a function of inner products and squared norms alone, so u = along * target + across * g; each layer
sends it back as derivatives in its input a and in d = dL/d(output), and one ordinary backward pass through the graph
of the first takes these to the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from medpfl.attacks.matching.fitting import fitting, most_at_once
from medpfl.attacks.matching.ghost.taps import Tapped, tap
from medpfl.attacks.matching.layout import CANNOT, BatchedObjective, Layout, once_per_batch
from medpfl.attacks.matching.objectives import OF_MOMENTS, Distance, OfMoments, squared_distance
from medpfl.attacks.matching.priors import Prior
from medpfl.attacks.matching.problem import Problem
from medpfl.attacks.matching.statistics import StatisticsPrior, in_order, statistics_distance
from medpfl.core.domain import GlobalModel
from medpfl.core.memory import is_out_of_memory


@dataclass(frozen=True)
class _Group:
    """Candidates that run as one batch. rows: their places among all. targets: (A or 1, *shape) by name."""

    rows: Tensor
    tapped: Tapped
    labels: Tensor | None
    targets: dict[str, Tensor]
    target_squares: Tensor
    weights: Tensor
    expected: list[Tensor]


def ghost_objective(
    problem: Problem,
    layout: Layout,
    labels: Tensor | None,
    *,
    distance: Distance,
    weights: Tensor,
    prior: Prior,
    statistics: StatisticsPrior | None = None,
) -> BatchedObjective | None:
    """See `matching_objective`; None where this way does not know a layer, the distance, or how clients trained."""
    if problem.simulate is not None or distance not in (squared_distance, *OF_MOMENTS):
        return None
    layers = () if statistics is None else statistics.layers
    used = (weights != 0).any(dim=0)
    names = [name for name, one in zip(problem.names, used.tolist(), strict=True) if one]
    targets = {name: target for name, target in zip(problem.names, problem.targets, strict=True) if name in set(names)}
    tapped: dict[int, Tapped] = {}
    for model in problem.models:
        if id(model) not in tapped:
            found = tap(model, names, problem.examples, problem.batch_norm, layers)
            if found is None:
                return None
            tapped[id(model)] = found
    of_victim = [tapped[id(model)] for model in problem.models]
    squares = torch.stack([target.flatten(1).square().sum(dim=1) for target in targets.values()], dim=1)
    weights = weights[:, used]
    if not _each_layer_once(problem, of_victim[0], layout, names):
        return None
    evaluate = partial(_evaluate, problem.models[0], layout, prior, layers, OF_MOMENTS.get(distance))

    @cache
    def at_once() -> int:
        """Measured with candidates of the first victim; those of several hold targets of their own besides."""
        targets_of_one = sum(target[0].nbytes for target in targets.values())

        def candidates(count: int) -> tuple[Tensor, Tensor]:
            rows = torch.arange(count, device=problem.device)
            variables = problem.targets[0].new_full((count, layout.size), 0.5)
            return evaluate(group(rows, torch.zeros_like(rows)), variables)

        return fitting(candidates, problem.device, most_at_once(problem.device), beside=targets_of_one)

    @once_per_batch
    def grouped(victims: Tensor) -> list[_Group]:
        return [group(rows, victims[rows]) for rows in _batches(victims, of_victim, at_once())]

    def group(rows: Tensor, victims: Tensor) -> _Group:
        chosen = _selection(victims)
        return _Group(
            rows=rows,
            tapped=of_victim[int(victims[0])],
            labels=None if labels is None else labels[victims],
            targets={name: target[chosen] for name, target in targets.items()},
            target_squares=squares[victims],
            weights=weights[victims],
            expected=[] if statistics is None else statistics.expected(victims),
        )

    def objective(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        groups = grouped(victims)
        if len(groups) == 1:
            return evaluate(groups[0], variables)
        values, derivatives = variables.new_empty(len(variables)), torch.empty_like(variables)
        for one in groups:
            values[one.rows], derivatives[one.rows] = evaluate(one, variables[one.rows])
        return values, derivatives

    return objective


def _evaluate(
    model: GlobalModel,
    layout: Layout,
    prior: Prior,
    layers: Sequence[str],
    of_moments: OfMoments | None,
    group: _Group,
    variables: Tensor,
) -> tuple[Tensor, Tensor]:
    """Values (A,) and derivatives (A, n) of the candidates of one group; the squared distance without `of_moments`."""
    count = len(variables)
    flat = variables.detach().requires_grad_()
    images, logits = layout.split(flat)
    target = layout.targets(model.task, logits) if logits is not None else group.labels
    assert target is not None
    output, calls, statistics = group.tapped.forward(images.flatten(0, 1))
    loss = torch.func.vmap(model.task.loss)(output.reshape(count, -1, *output.shape[1:]), target).sum()
    found = torch.autograd.grad(loss, [call.z for call in calls], create_graph=True)
    with torch.no_grad():
        gradients = [
            (call, d, call.layer.gradients(call.a.detach(), d.detach(), group.targets, count, of_moments is None))
            for call, d in zip(calls, found, strict=True)
        ]
        moments = [one.moments() for _, _, several in gradients for one in several]
    order = [name for call in calls for name in call.layer.names]
    places = [order.index(name) for name in group.targets]
    inner, square = (torch.stack([moments[place][part] for place in places], dim=1) for part in (0, 1))
    value, along, across = _combined(inner, square, group, of_moments)
    outputs: list[Tensor] = []
    sent: list[Tensor] = []
    with torch.no_grad():
        column = {place: index for index, place in enumerate(places)}
        place = 0
        for call, d, several in gradients:
            for one in several:
                into_d, into_a = one.pull(along[:, column[place]], across[:, column[place]])
                place += 1
                if into_d is not None and d.requires_grad:
                    outputs.append(d)
                    sent.append(into_d)
                if into_a is not None and call.a.requires_grad:
                    outputs.append(call.a)
                    sent.append(into_a)
    penalty = torch.func.vmap(prior)(images)
    if layers:
        seen = in_order(statistics, layers)
        penalty = penalty + torch.func.vmap(statistics_distance)(seen, group.expected)
    if penalty.requires_grad:
        outputs.append(penalty)
        sent.append(torch.ones_like(penalty))
    (derivative,) = torch.autograd.grad(outputs, flat, sent)
    return (value + penalty).detach(), derivative


def _combined(
    inner: Tensor, square: Tensor, group: _Group, of_moments: OfMoments | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Distances (A,) with the factors (A, tensors) of targets and gradients in their derivatives."""
    if of_moments is None:
        return (square * group.weights).sum(dim=1), torch.zeros_like(square), 2.0 * group.weights
    inner, square = inner.requires_grad_(), square.requires_grad_()
    value = of_moments(inner, square, group.target_squares, group.weights)
    along, half = torch.autograd.grad(value.sum(), (inner, square))
    return value.detach(), along, 2.0 * half


def _batches(victims: Tensor, of_victim: Sequence[Tapped], at_once: int) -> list[Tensor]:
    """Rows of candidates that share a model, at most `at_once` together."""
    owners = [id(of_victim[victim]) for victim in victims.tolist()]
    members = [[row for row, one in enumerate(owners) if one == owner] for owner in dict.fromkeys(owners)]
    rows = [torch.tensor(several, device=victims.device) for several in members]
    return [chunk for several in rows for chunk in torch.split(several, at_once)]


def _selection(victims: Tensor) -> Tensor | slice:
    """How to take these victims' targets: without a copy where they are one victim or lie side by side."""
    first, count = int(victims[0]), len(victims)
    if bool((victims == first).all()):
        return slice(first, first + 1)
    if bool((victims == torch.arange(first, first + count, device=victims.device)).all()):
        return slice(first, first + count)
    return victims


def _each_layer_once(problem: Problem, tapped: Tapped, layout: Layout, names: Sequence[str]) -> bool:
    """Whether the model runs, and uses each of the layers once."""
    images = problem.targets[0].new_full(layout.images, 0.5)
    try:
        _, calls, _ = tapped.forward(images)
    except CANNOT as error:
        if is_out_of_memory(error):
            raise
        return False
    return sorted(name for call in calls for name in call.layer.names) == sorted(names)

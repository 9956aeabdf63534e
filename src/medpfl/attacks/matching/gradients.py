"""The batched objective: candidates -> distance between their gradients and the observed ones, with its derivative.

Three ways compute the same numbers. Ghost matching runs all candidates of a model as one ordinary batch and knows the
common layers; where it does not apply, small models run all candidates at once through `torch.func.vmap`, and large
ones run one candidate after the other with a plain double backward, because batching per-candidate weight gradients of
a large model that way costs more than it saves (two to four times slower on a ResNet18).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from medpfl.attacks.matching.compiled import compiled_objective, compiler_missing, worth_compiling
from medpfl.attacks.matching.fitting import fitting, most_at_once
from medpfl.attacks.matching.ghost.objective import ghost_objective
from medpfl.attacks.matching.layout import CANNOT, BatchedObjective, Layout, once_per_batch
from medpfl.attacks.matching.objectives import Distance, Transformed
from medpfl.attacks.matching.priors import Prior
from medpfl.attacks.matching.problem import Problem
from medpfl.attacks.matching.statistics import StatisticsPrior, in_order, statistics_distance
from medpfl.core.domain import Batch, GlobalModel, Tensors
from medpfl.core.memory import is_out_of_memory
from medpfl.federation.client import client_step
from medpfl.models.batch_norm import Statistics, forward_with_statistics

_Value = Callable[
    [Tensor, Tensor | None, GlobalModel, Sequence[str], Sequence[Tensor], Tensor, Sequence[Tensor]], Tensor
]

VMAP_PARAMETERS = 400_000
"""Models with at most this many trainable entries are batched over candidates, larger ones run in a loop."""

Method = Literal["auto", "ghost", "vmap", "compiled", "loop"]

__all__ = [
    "BatchedObjective",
    "Layout",
    "Method",
    "matching_objective",
    "runs_batched",
    "why_not_computable",
]


def matching_objective(
    problem: Problem,
    layout: Layout,
    labels: Tensor | None,
    *,
    distance: Distance,
    weights: Tensor,
    prior: Prior,
    statistics: StatisticsPrior | None = None,
    method: Method = "auto",
    evaluations: int = 0,
) -> BatchedObjective:
    """Distance of candidate gradients to the targets, plus the prior on the candidate's images, plus that on the
    statistics of what its batch norm layers receive.

    labels: (V, K) int64 or (V, K, classes) float, masks (V, K, *spatial); None where the layout holds logits. weights: (V, tensors), one
    per trainable tensor of `problem.names`. method: `auto` takes ghost matching where it applies and agrees with
    the plain way on two random candidates, else batches models that are small enough (`VMAP_PARAMETERS`) if PyTorch
    can. `compiled` is `vmap` with full batches through `torch.compile`, and `auto` adds it to the others where
    `evaluations`, those of all candidates expected, amortize it; with `statistics` nothing is compiled. Raises
    ValueError if ghost matching is asked for and does not apply.
    """
    layers = () if statistics is None else statistics.layers

    def value(
        flat: Tensor,
        label: Tensor | None,
        model: GlobalModel,
        names: Sequence[str],
        targets: Sequence[Tensor],
        weight: Tensor,
        expected: Sequence[Tensor],
    ) -> Tensor:
        images, logits = layout.split(flat)
        target = layout.targets(problem.models[0].task, logits) if logits is not None else label
        assert target is not None
        gradients, found = _candidate_update(problem, model, names, images, target, layers)
        result = distance([gradients[name] for name in names], targets, weight) + prior(images)
        return result + statistics_distance(in_order(found, layers), expected) if layers else result

    looped = _looped(problem, labels, weights, statistics, value, all_tensors=isinstance(distance, Transformed))
    small = runs_batched(problem.models[0]) and (problem.shared or not problem.models[0].constants)
    parts: _Parts = {"distance": distance, "weights": weights, "prior": prior, "statistics": statistics}
    compiles = method == "compiled" or (method == "auto" and small and worth_compiling(evaluations, problem))
    if compiles and statistics is None:
        plain: Method = "auto" if method == "auto" else "loop"
        rest = matching_objective(problem, layout, labels, **parts, method=plain)
        if compiler_missing() or why_not_computable(looped, layout, problem.targets[0]) is not None:
            return rest
        return compiled_objective(rest, _mapped(problem, labels, value, None), _chooser(problem, labels, weights, None))
    if method in ("auto", "ghost"):
        ghost = ghost_objective(problem, layout, labels, **parts)
        if ghost is not None and (method == "ghost" or agree(ghost, looped, problem, layout)):
            return ghost
        if method == "ghost":
            raise ValueError("ghost matching does not know a layer of this model, this distance, or local training")
    if method == "loop" or (method == "auto" and not small):
        return looped
    if not problem.shared and problem.models[0].constants:
        return looped
    batched = _vmapped(problem, layout, labels, weights, statistics, value)
    if method == "auto" and why_not_computable(batched, layout, problem.targets[0]) is not None:
        return looped
    return batched


def runs_batched(model: GlobalModel) -> bool:
    """Whether the model is small enough to run all candidates at once."""
    return model.parameter_count <= VMAP_PARAMETERS


def agree(one: BatchedObjective, plain: BatchedObjective, problem: Problem, layout: Layout) -> bool:
    """Whether two objectives have the same values and derivatives for two random candidates, to rounding.

    Models may do with their layers what ghost matching does not see: use them twice, share tensors, mix images.
    """
    generator = torch.Generator().manual_seed(0)
    variables = torch.rand(2, layout.size, generator=generator, dtype=torch.float64).to(problem.targets[0])
    victims = torch.tensor([0, len(problem.models) - 1], device=problem.device)
    try:
        found, expected = one(variables, victims), plain(variables, victims)
    except CANNOT as error:
        if is_out_of_memory(error):
            raise
        return False
    tolerance = 1e-6 if problem.dtype == torch.float64 else 1e-2
    return all(float((a - b).norm()) <= tolerance * float(b.norm()) for a, b in zip(found, expected, strict=True))


def why_not_computable(objective: BatchedObjective, layout: Layout, like: Tensor) -> str | None:
    """PyTorch's reason why the objective has no value and derivative for one grey candidate; None if it has.

    like: a tensor of the search's precision and device. Layers without second derivatives, batching rules or double precision show here.
    """
    try:
        objective(like.new_full((1, layout.size), 0.5), like.new_zeros(1, dtype=torch.int64))
    except CANNOT as error:
        if is_out_of_memory(error):
            raise
        return str(error).strip().partition("\n")[0][:200]
    return None


def _candidate_update(
    problem: Problem, model: GlobalModel, names: Sequence[str], images: Tensor, target: Tensor, layers: Sequence[str]
) -> tuple[Tensors, Statistics]:
    """What a client with these images would have sent for the tensors `names`, in the units of the targets.

    With it come the statistics of what the batch norm `layers` of the received model make of the images: of the same
    forward pass where one gradient says it all, else of one over all images before training.
    """
    if problem.simulate is None:

        def loss(selected: dict[str, Tensor]) -> tuple[Tensor, Statistics]:
            parameters = {**model.parameters, **selected}
            output, found = forward_with_statistics(
                model, images, layers, parameters=parameters, batch_norm=problem.batch_norm
            )
            return model.task.loss(output, target), found

        chosen = {name: model.parameters[name] for name in names}
        both: tuple[Tensors, Statistics] = torch.func.grad(loss, has_aux=True)(chosen)
        return both
    found: Statistics = {}
    if layers:
        _, found = forward_with_statistics(model, images, layers, batch_norm=problem.batch_norm)
    recipe = problem.simulate
    update, _ = client_step(model, Batch(images, target), recipe, hooks=problem.hooks, steps=problem.taken)
    if recipe.update == "gradient":
        return update.trainable, found
    factor = -1.0 / (recipe.learning_rate * problem.steps)
    old = model.parameters if recipe.update == "weights" else None
    steps = {name: tensor if old is None else tensor - old[name] for name, tensor in update.trainable.items()}
    return {name: factor * step for name, step in steps.items()}, found


_Mapped = Callable[..., tuple[Tensor, Tensor]]


class _Parts(TypedDict):
    distance: Distance
    weights: Tensor
    prior: Prior
    statistics: StatisticsPrior | None


class _Chosen(NamedTuple):
    labels: Tensor | None
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    targets: list[Tensor]
    weights: Tensor
    expected: list[Tensor]


def _mapped(problem: Problem, labels: Tensor | None, value: _Value, at_once: int | None) -> _Mapped:
    """Derivatives and values of candidates, given what `_chooser` gives for their victims."""
    template, names = problem.models[0], problem.names

    def single(
        flat: Tensor,
        label: Tensor | None,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        targets: Sequence[Tensor],
        weight: Tensor,
        expected: Sequence[Tensor],
    ) -> Tensor:
        model = template if problem.shared else replace(template, parameters=parameters, buffers=buffers)
        return value(flat, label, model, names, targets, weight, expected)

    per_victim = None if problem.shared else 0
    in_dims = (0, None if labels is None else 0, per_victim, per_victim, 0, 0, 0)
    mapped: _Mapped = torch.func.vmap(torch.func.grad_and_value(single), in_dims=in_dims, chunk_size=at_once)
    return mapped


def _chooser(
    problem: Problem, labels: Tensor | None, weights: Tensor, statistics: StatisticsPrior | None
) -> Callable[[Tensor], _Chosen]:
    """Victims' labels, models, targets, weights and expected statistics per candidate."""
    parameters = _stacked([model.parameters for model in problem.models], problem.shared)
    buffers = _stacked([model.buffers for model in problem.models], problem.shared)
    return lambda victims: _Chosen(
        None if labels is None else labels[victims],
        _pick(parameters, victims, problem.shared),
        _pick(buffers, victims, problem.shared),
        [target[victims] for target in problem.targets],
        weights[victims],
        [] if statistics is None else statistics.expected(victims),
    )


def _vmapped(
    problem: Problem,
    layout: Layout,
    labels: Tensor | None,
    weights: Tensor,
    statistics: StatisticsPrior | None,
    value: _Value,
) -> BatchedObjective:
    choose = once_per_batch(_chooser(problem, labels, weights, statistics))

    @cache
    def mapped() -> _Mapped:
        whole, like = _mapped(problem, labels, value, None), problem.targets[0]

        def candidates(count: int) -> tuple[Tensor, Tensor]:
            victims = torch.zeros(count, dtype=torch.int64, device=problem.device)
            return whole(like.new_full((count, layout.size), 0.5), *choose(victims))

        at_once = fitting(candidates, problem.device, most_at_once(problem.device))
        return _mapped(problem, labels, value, at_once)

    def objective(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        derivative, values = mapped()(variables, *choose(victims))
        return values.detach(), derivative.detach()

    return objective


def _looped(
    problem: Problem,
    labels: Tensor | None,
    weights: Tensor,
    statistics: StatisticsPrior | None,
    value: _Value,
    all_tensors: bool,
) -> BatchedObjective:
    """all_tensors: gradients of tensors without weight are computed too."""

    def arguments(victim: int) -> tuple[Any, ...]:
        used = (torch.ones_like(weights[victim]) if all_tensors else weights[victim]).nonzero().flatten()
        return (
            None if labels is None else labels[victim],
            problem.models[victim],
            [problem.names[index] for index in used.tolist()],
            [problem.targets[index][victim] for index in used.tolist()],
            weights[victim][used],
            [] if statistics is None else statistics.expected(victim),
        )

    chosen = once_per_batch(lambda victims: [arguments(victim) for victim in victims.tolist()])

    def objective(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        values, derivatives = [], []
        for flat, one in zip(variables, chosen(victims), strict=True):
            point = flat.detach().requires_grad_()
            result = value(point, *one)
            (derivative,) = torch.autograd.grad(result, point)
            values.append(result.detach())
            derivatives.append(derivative)
        return torch.stack(values), torch.stack(derivatives)

    return objective


def _stacked(tensors: Sequence[Tensors], shared: bool) -> dict[str, Tensor]:
    if shared:
        return dict(tensors[0])
    return {name: torch.stack([one[name] for one in tensors]) for name in tensors[0]}


def _pick(tensors: dict[str, Tensor], victims: Tensor, shared: bool) -> dict[str, Tensor]:
    return tensors if shared else {name: tensor[victims] for name, tensor in tensors.items()}

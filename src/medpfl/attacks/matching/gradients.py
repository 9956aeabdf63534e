"""The batched objective: candidates -> distance between their gradients and the observed ones, with its derivative.

Two ways compute the same numbers. Small models run all candidates at once through `torch.func.vmap`; large ones run
one candidate after the other with a plain double backward, because batching per-candidate weight gradients of a large
model costs more than it saves (two to four times slower on a ResNet18).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from medpfl.attacks.matching.objectives import Distance
from medpfl.attacks.matching.priors import Prior
from medpfl.attacks.matching.problem import Problem
from medpfl.core.domain import Batch, GlobalModel, Tensors
from medpfl.core.tasks import Task
from medpfl.federation.client import client_step

BatchedObjective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Variables (A, n) and the victim of each row (A,) -> values (A,) and derivatives (A, n)."""

_Value = Callable[[Tensor, Tensor | None, GlobalModel, Sequence[str], Sequence[Tensor], Tensor], Tensor]

VMAP_PARAMETERS = 400_000
"""Models with at most this many trainable entries are batched over candidates, larger ones run in a loop."""

CANDIDATES_AT_ONCE = 64
ENTRIES_AT_ONCE = 2_000_000
"""One vmap call holds at most so many candidates, and gradients of at most so many entries together (about 1 GB)."""

Method = Literal["auto", "vmap", "loop"]


@dataclass(frozen=True)
class Layout:
    """How a candidate's variables lie in one vector: images (K, C, *spatial), then label logits (K, classes) if any."""

    images: tuple[int, ...]
    classes: int = 0

    @property
    def pixels(self) -> int:
        """Entries that belong to the images."""
        return prod(self.images)

    @property
    def size(self) -> int:
        """All entries."""
        return self.pixels + self.images[0] * self.classes

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor | None]:
        """(..., n) -> images (..., K, C, *spatial) and logits (..., K, classes), None where labels are fixed."""
        leading = flat.shape[:-1]
        images = flat[..., : self.pixels].reshape(*leading, *self.images)
        if not self.classes:
            return images, None
        return images, flat[..., self.pixels :].reshape(*leading, self.images[0], self.classes)


def matching_objective(
    problem: Problem,
    layout: Layout,
    labels: Tensor | None,
    *,
    distance: Distance,
    weights: Tensor,
    prior: Prior,
    method: Method = "auto",
) -> BatchedObjective:
    """Distance of candidate gradients to the targets, plus the prior on the candidate's images.

    labels: (V, K) int64 or (V, K, classes) float; None where the layout holds label logits. weights: (V, tensors), one
    per trainable tensor of `problem.names`. method: `auto` batches models that are small enough
    (`VMAP_PARAMETERS`) if PyTorch can.
    """

    def value(
        flat: Tensor,
        label: Tensor | None,
        model: GlobalModel,
        names: Sequence[str],
        targets: Sequence[Tensor],
        weight: Tensor,
    ) -> Tensor:
        images, logits = layout.split(flat)
        target = soft_labels(problem.models[0].task, logits) if logits is not None else label
        assert target is not None
        gradients = _candidate_update(problem, model, names, images, target)
        return distance([gradients[name] for name in names], targets, weight) + prior(images)

    looped = _looped(problem, labels, weights, value)
    if method == "loop" or (method == "auto" and not runs_batched(problem.models[0])):
        return looped
    if not problem.shared and problem.models[0].constants:
        return looped
    batched = _vmapped(problem, labels, weights, value)
    if method == "auto" and why_not_computable(batched, layout, problem.dtype) is not None:
        return looped
    return batched


def runs_batched(model: GlobalModel) -> bool:
    """Whether the model is small enough to run all candidates at once."""
    return model.parameter_count <= VMAP_PARAMETERS


def why_not_computable(objective: BatchedObjective, layout: Layout, dtype: torch.dtype) -> str | None:
    """PyTorch's reason why the objective has no value and derivative for one grey candidate; None if it has.

    Layers without second derivatives, batching rules or double precision show here.
    """
    try:
        objective(torch.full((1, layout.size), 0.5, dtype=dtype), torch.zeros(1, dtype=torch.int64))
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return str(error).strip().partition("\n")[0][:200]
    return None


def soft_labels(task: Task, logits: Tensor) -> Tensor:
    """Label logits (..., classes) as targets: softmax for one class per image, sigmoid for independent classes."""
    return logits.sigmoid() if task.name == "multi_label" else logits.softmax(dim=-1)


def _candidate_update(
    problem: Problem, model: GlobalModel, names: Sequence[str], images: Tensor, target: Tensor
) -> Tensors:
    """What a client with these images would have sent for the tensors `names`, in the units of the targets."""
    if problem.simulate is None:

        def loss(selected: dict[str, Tensor]) -> Tensor:
            parameters = {**model.parameters, **selected}
            output, _ = model.forward(images, parameters=parameters, batch_norm=problem.batch_norm)
            return model.task.loss(output, target)

        gradients: Tensors = torch.func.grad(loss)({name: model.parameters[name] for name in names})
        return gradients
    recipe = problem.simulate
    update, _ = client_step(model, Batch(images, target), recipe)
    if recipe.update == "gradient":
        return update.trainable
    factor = -1.0 / (recipe.learning_rate * problem.steps)
    old = model.parameters if recipe.update == "weights" else None
    return {name: factor * (tensor if old is None else tensor - old[name]) for name, tensor in update.trainable.items()}


class _Chosen(NamedTuple):
    victims: Tensor
    labels: Tensor | None
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    targets: list[Tensor]
    weights: Tensor


def _vmapped(problem: Problem, labels: Tensor | None, weights: Tensor, value: _Value) -> BatchedObjective:
    template, names = problem.models[0], problem.names
    parameters = _stacked([model.parameters for model in problem.models], problem.shared)
    buffers = _stacked([model.buffers for model in problem.models], problem.shared)

    def single(
        flat: Tensor,
        label: Tensor | None,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        targets: Sequence[Tensor],
        weight: Tensor,
    ) -> Tensor:
        return value(flat, label, replace(template, parameters=parameters, buffers=buffers), names, targets, weight)

    per_victim = None if problem.shared else 0
    mapped = torch.func.vmap(
        torch.func.grad_and_value(single),
        in_dims=(0, None if labels is None else 0, per_victim, per_victim, 0, 0),
        chunk_size=max(1, min(CANDIDATES_AT_ONCE, ENTRIES_AT_ONCE // template.parameter_count)),
    )
    kept: list[_Chosen] = []

    def choose(victims: Tensor) -> _Chosen:
        """Victims' tensors per candidate, kept as long as the same candidates run."""
        if not kept or kept[0].victims is not victims:
            kept[:] = [
                _Chosen(
                    victims,
                    None if labels is None else labels[victims],
                    _pick(parameters, victims, problem.shared),
                    _pick(buffers, victims, problem.shared),
                    [target[victims] for target in problem.targets],
                    weights[victims],
                )
            ]
        return kept[0]

    def objective(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        derivative, values = mapped(variables, *choose(victims)[1:])
        return values.detach(), derivative.detach()

    return objective


def _looped(problem: Problem, labels: Tensor | None, weights: Tensor, value: _Value) -> BatchedObjective:
    def objective(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        values, derivatives = [], []
        for flat, victim in zip(variables, victims.tolist(), strict=True):
            point = flat.detach().requires_grad_()
            label = None if labels is None else labels[victim]
            used = weights[victim].nonzero().flatten().tolist()
            names = [problem.names[index] for index in used]
            targets = [problem.targets[index][victim] for index in used]
            result = value(point, label, problem.models[victim], names, targets, weights[victim][used])
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

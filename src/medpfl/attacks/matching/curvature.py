"""Where the objective is steep and where it is flat, before the first step: the Gauss-Newton matrix at a grey image.

The squared distance between gradients is flat by factors of 10^6 to 10^8 in some directions of the image against
others (at 32x32 in color on DLG's LeNet, for instance), and most of this shape depends on the model and on the output
error's signs rather than on the image. So one matrix serves all victims that share a model and a label.
"""

from __future__ import annotations

from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor

from medpfl.attacks.matching.fitting import fitting
from medpfl.attacks.matching.gradients import runs_batched
from medpfl.attacks.matching.initialization import GREY
from medpfl.attacks.matching.layout import once_per_batch
from medpfl.attacks.matching.lbfgs import Preconditioner
from medpfl.attacks.matching.output_error import typical_error
from medpfl.attacks.matching.problem import Problem
from medpfl.core.domain import GlobalModel
from medpfl.core.memory import is_out_of_memory

LARGEST = 4096
"""Entries of an image up to which the matrix is worth its memory (n^2) and its factorization (n^3)."""

COLUMNS_AT_ONCE = 128
"""At most so many directions are differentiated together."""


class Curvature(NamedTuple):
    """The inverse of the matrix, and what it cost each victim: a column counts as one evaluation of the objective,
    shared by the victims that share the matrix."""

    precondition: Preconditioner
    evaluations: tuple[int, ...]


def columns(model: GlobalModel) -> int:
    """Columns of a model's matrix, none where it is not made: for large images (n^3) or models (n passes)."""
    pixels = prod(model.image_shape)
    return pixels if pixels <= LARGEST and runs_batched(model) else 0


def gauss_newton(problem: Problem, errors: Tensor, weights: Tensor, damping: float) -> Curvature | None:
    """The inverse of 2 J' W J + damping * its mean diagonal, J being the derivative of the gradient at a grey image.

    problem: one image per victim, its models' losses start from output errors (`output_error.with_known_error`).
    errors: (V, classes); those of one pattern of signs share a matrix, made for the `typical_error`. weights:
    (V, tensors), the diagonal of W, of the squared distance. None where image or model are too large
    (`columns`), or where PyTorch cannot differentiate the model often enough.
    """
    if not columns(problem.models[0]):
        return None
    typical = typical_error(errors)
    sizes = typical.square().sum(dim=1) * weights.amax(dim=1)
    members: dict[tuple[object, ...], list[int]] = {}
    for victim, model in enumerate(problem.models):
        pattern = tuple((weights[victim] / weights[victim].amax()).tolist())
        members.setdefault((id(model), tuple((errors[victim] < 0).tolist()), pattern), []).append(victim)
    owners = [0] * len(problem.models)
    costs = [0] * len(problem.models)
    inverses: list[Tensor] = []
    for victims in members.values():
        first = victims[0]
        for victim in victims:
            owners[victim] = len(inverses)
            costs[victim] = ceil(columns(problem.models[0]) / len(victims))
        unit, weight = typical[first] / typical[first].norm(), weights[first] / weights[first].amax()
        matrix = _matrix(problem, problem.models[first], unit, weight)
        if matrix is None:
            return None
        inverses.append(_inverse(matrix, damping))

    @once_per_batch
    def rows_of(victims: Tensor) -> list[tuple[int, Tensor]]:
        mine = [owners[victim] for victim in victims.tolist()]
        members = {owner: [row for row, one in enumerate(mine) if one == owner] for owner in sorted(set(mine))}
        return [(owner, torch.tensor(rows, device=victims.device)) for owner, rows in members.items()]

    def precondition(gradients: Tensor, victims: Tensor) -> Tensor:
        scaled = torch.empty_like(gradients)
        for owner, rows in rows_of(victims):
            unit = gradients[rows].norm(dim=1, keepdim=True).clamp_min(torch.finfo(gradients.dtype).tiny)
            scaled[rows] = ((gradients[rows] / unit).float() @ inverses[owner]).to(gradients.dtype) * unit
        return scaled / sizes[victims, None].to(gradients.dtype)

    return Curvature(precondition, tuple(costs))


def _matrix(problem: Problem, model: GlobalModel, error: Tensor, weights: Tensor) -> Tensor | None:
    """All of 2 J' W J at the grey image (n, n); None where PyTorch cannot differentiate the model often enough."""
    axes = torch.eye(columns(model), device=problem.device)

    def some(count: int) -> Tensor:
        return _columns(problem, model, error, weights, axes[:count], count)

    try:
        at_once = fitting(some, problem.device, COLUMNS_AT_ONCE)
    except (RuntimeError, NotImplementedError) as cause:  # more columns meet no missing derivative that two did not
        if is_out_of_memory(cause):
            raise
        return None
    return _columns(problem, model, error, weights, axes, at_once)


def _columns(
    problem: Problem, model: GlobalModel, error: Tensor, weights: Tensor, axes: Tensor, at_once: int
) -> Tensor:
    """Rows 2 J' W J axis (len(axes), n) at the grey image, in single precision, so many at once."""
    model = model.to(torch.float32)
    shape = (1, *model.image_shape)
    point = axes.new_full((prod(shape),), GREY)
    target = error.float()[None]

    def gradient(flat: Tensor) -> list[Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            output, _ = model.forward(flat.reshape(shape), parameters=parameters, batch_norm=problem.batch_norm)
            return model.task.loss(output, target)

        gradients = torch.func.grad(loss)(dict(model.parameters))
        return [gradients[name] for name in problem.names]

    pull_back = torch.func.vjp(gradient, point)[1]

    def column(direction: Tensor) -> Tensor:
        change = torch.func.jvp(gradient, (point,), (direction,))[1]
        weighted = [2.0 * weight * tensor for weight, tensor in zip(weights.float(), change, strict=True)]
        (result,) = pull_back(weighted)
        found: Tensor = result
        return found

    found: Tensor = torch.func.vmap(column, chunk_size=at_once)(axes)
    return found.double()


def _inverse(matrix: Tensor, damping: float) -> Tensor:
    """Of the symmetric part with `damping` times the mean diagonal added, symmetric, in single precision."""
    ridge = damping * matrix.diagonal().mean().clamp_min(torch.finfo(matrix.dtype).tiny)
    damped = 0.5 * (matrix + matrix.T) + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    factor = torch.linalg.cholesky(damped)
    inverse = torch.cholesky_inverse(factor).float()
    return 0.5 * (inverse + inverse.T)

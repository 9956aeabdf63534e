"""Weight gradients of single layers, per candidate: what matching reads from them, and what it sends back.

The gradient g(a, d) of a weight tensor is linear in the layer's input a and in the derivative d of the loss in its
output. Matching reads its inner product with the target and its squared norm, and sends a direction back: the
derivative of <g(a, d), direction> in d and in a. `Explicit` forms g; `Gram` never does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Pulled = tuple[Tensor | None, Tensor | None]
"""Derivatives in d and in a; None where there is none."""


class Gradient(Protocol):
    """One weight tensor's gradients of A candidates."""

    def moments(self) -> tuple[Tensor, Tensor]:
        """Inner products with the targets and squared norms: (A,) each."""

    def pull(self, along: Tensor, across: Tensor) -> Pulled:
        """Sends along * target + across * gradient back; both factors (A,). May be called once."""


@dataclass(frozen=True)
class Explicit:
    """Gradients as tensors (A, *shape), overwritten by `pull`.

    target: (A, *shape), or (1, *shape) where all candidates share it. adjoint: directions (A, *shape) -> derivatives.
    residual: gradients are replaced by their differences to the targets, whose squared norm has no cancellation; then
    inner products are 0 and only `across` counts.
    """

    gradient: Tensor
    target: Tensor
    adjoint: Callable[[Tensor], Pulled]
    residual: bool

    def moments(self) -> tuple[Tensor, Tensor]:
        """See `Gradient`."""
        if self.residual:
            self.gradient.sub_(self.target)
        flat = self.gradient.flatten(1)
        square = inner_products(flat, flat)
        return torch.zeros_like(square) if self.residual else inner_products(flat, self.target.flatten(1)), square

    def pull(self, along: Tensor, across: Tensor) -> Pulled:
        """See `Gradient`."""
        expand = (-1, *(1 for _ in self.gradient.shape[1:]))
        direction = self.gradient.mul_(across.view(expand))
        if not self.residual:
            direction.addcmul_(self.target, along.view(expand))
        return self.adjoint(direction)


@dataclass(frozen=True)
class Gram:
    """Gradients outputs' @ columns that are never formed, for weights that are large beside their R positions.

    columns: inputs of a matrix product (A, R, inputs). outputs: derivatives in its outputs (A, R, outputs). target:
    (A or 1, outputs, inputs). column_gram and output_gram: (A, R, R). answers: columns @ target' (A, R, outputs).
    into_a and into_d: derivatives in columns and outputs -> those in the layer's input and output.
    """

    columns: Tensor
    outputs: Tensor
    target: Tensor
    column_gram: Tensor
    output_gram: Tensor
    answers: Tensor
    into_a: Callable[[Tensor], Tensor]
    into_d: Callable[[Tensor], Tensor]

    def moments(self) -> tuple[Tensor, Tensor]:
        """See `Gradient`: <g, G> = <outputs, columns G'>, |g|^2 = <columns columns', outputs outputs'>."""
        inner = (self.answers * self.outputs).sum(dim=(1, 2))
        return inner, (self.column_gram * self.output_gram).sum(dim=(1, 2))

    def pull(self, along: Tensor, across: Tensor) -> Pulled:
        """See `Gradient`."""
        along, across = along[:, None, None], across[:, None, None]
        rows = torch.bmm(self.column_gram, self.outputs).mul_(across).addcmul_(self.answers, along)
        back = torch.bmm(self.output_gram, self.columns).mul_(across)
        back.addcmul_(times(self.outputs, self.target), along)
        return self.into_d(rows), self.into_a(back)


def gram(
    columns: Tensor,
    outputs: Tensor,
    target: Tensor,
    into_a: Callable[[Tensor], Tensor],
    into_d: Callable[[Tensor], Tensor],
) -> Gram:
    """A `Gram` with its products computed."""
    return Gram(
        columns,
        outputs,
        target,
        torch.bmm(columns, columns.transpose(1, 2)),
        torch.bmm(outputs, outputs.transpose(1, 2)),
        times(columns, target.transpose(1, 2)),
        into_a,
        into_d,
    )


def times(rows: Tensor, matrices: Tensor) -> Tensor:
    """Products (A, R, m) of rows (A, R, n) with matrices (A or 1, n, m); a shared matrix is read once."""
    if len(matrices) == len(rows):
        return torch.bmm(rows, matrices)
    return torch.mm(rows.flatten(0, 1), matrices[0]).reshape(*rows.shape[:2], -1)


def inner_products(vectors: Tensor, others: Tensor) -> Tensor:
    """Inner products (A,) of rows (A, n) with rows (A or 1, n).

    As sums of products: PyTorch adds those up pairwise, but norms and dot products one after the other, which costs up
    to three digits in float32 for the weights of a ResNet18.
    """
    return (vectors * others).sum(dim=1)

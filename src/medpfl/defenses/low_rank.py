"""Low-rank factors of the update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.domain import Tensors
from medpfl.core.mechanisms import LowRank
from medpfl.defenses.base import DEFENSES
from medpfl.defenses.compression import Compression


@DEFENSES.register(
    "low_rank",
    summary="matrices are sent as products of two thin factors found by power iteration",
    paper="Vogels, Karimireddy, Jaggi: PowerSGD, NeurIPS 2019 (arXiv 1905.13727), algorithm 1",
    limits="the factor is sent, so what is sent are exact linear measurements; biases are sent whole; no privacy "
    "guarantee",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class LowRankFactors(Compression):
    """For every matrix M (first axis x rest): P = orthonormal columns of M Q, Q = M^T P, sent is P Q^T.

    Q starts from normal noise in the first round and from the last round's Q later. Tensors with one axis, and those
    whose factors would not be `minimum_ratio` times smaller, are sent whole. The residual M - P Q^T is orthogonal to P.
    """

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "idlg", "distance": "likelihood", "total_variation": 1e-3}

    rank: Annotated[int, Field(ge=1, description="columns of the factors")] = 2
    iterations: Annotated[int, Field(ge=1, description="power iterations per round")] = 1
    minimum_ratio: Annotated[
        float, Field(ge=1, description="entries of a matrix over those of its factors that are needed to compress it")
    ] = 2.0

    def compress(
        self, change: Tensors, state: Tensors, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The product of the factors, and Q for the next round; computed in double precision."""
        message: dict[str, Tensor] = {}
        factors: dict[str, Tensor] = {}
        for name, tensor in change.items():
            if not self.compressor().applies(tensor.shape):
                message[name] = tensor
                continue
            matrix = tensor.double().flatten(1)
            start = state.get(name)
            if start is None:
                shape = (matrix.shape[1], self.rank)
                start = torch.randn(shape, dtype=torch.float64, generator=generator).to(matrix.device)
            left, right = power_iteration(matrix, start, self.iterations)
            message[name] = (left @ right.T).reshape(tensor.shape).to(tensor.dtype)
            factors[name] = right
        return message, factors

    def compressor(self) -> LowRank:
        """This rank."""
        return LowRank(self.rank, self.minimum_ratio)


def power_iteration(matrix: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Orthonormal P (rows, rank) and Q = M^T P (columns, rank) from a start (columns, rank)."""
    right = start
    for _ in range(iterations):
        left = torch.linalg.qr(matrix @ right).Q
        right = matrix.T @ left
    return left, right

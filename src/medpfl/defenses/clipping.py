"""Scaling gradients and updates down to a norm, differentiable and without any state."""

from __future__ import annotations

import torch
from torch import Tensor

from medpfl.core.domain import Tensors
from medpfl.core.mechanisms import NormKind

TINY = 1e-24
"""Added to a squared norm, so that the norm of nothing has a derivative."""


def clipped(tensors: Tensors, bound: float, norm: NormKind = "l2") -> dict[str, Tensor]:
    """All tensors times min(1, bound / their joint norm). What holds a number that is not finite becomes NaN throughout.

    >>> clipped({"weight": torch.tensor([3.0, 4.0])}, 1.0)["weight"]
    tensor([0.6000, 0.8000])
    """
    alone = {name: tensor[None] for name, tensor in tensors.items()}
    factor = clip_factors(alone, bound, norm)[0]
    return {name: tensor * factor for name, tensor in tensors.items()}


def clip_factors(tensors: Tensors, bound: float, norm: NormKind = "l2") -> Tensor:
    """(N,): min(1, bound / norm) of N examples, whose tensors are (N, *shape); the norm is over all tensors of one."""
    flat = [tensor.flatten(1) for tensor in tensors.values()]
    if norm == "l1":
        lengths = torch.stack([part.abs().sum(dim=1) for part in flat]).sum(dim=0) + TINY
    else:
        lengths = (torch.stack([part.square().sum(dim=1) for part in flat]).sum(dim=0) + TINY).sqrt()
    return torch.clamp(bound / lengths, max=1.0)


def clipped_sum(gradients: Tensors, bound: float, per_tensor: bool = False) -> dict[str, Tensor]:
    """Per-example gradients (N, *shape), each clipped to L2 norm `bound`, summed over the examples; zeros for N = 0.

    per_tensor: each tensor of an example is clipped on its own to bound / sqrt(tensors), so that all together keep
    within `bound`.
    """
    if not per_tensor:
        factors = clip_factors(gradients, bound)
        return {name: torch.einsum("n...,n->...", gradient, factors) for name, gradient in gradients.items()}
    share = bound / len(gradients) ** 0.5
    summed: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        summed |= clipped_sum({name: gradient}, share)
    return summed

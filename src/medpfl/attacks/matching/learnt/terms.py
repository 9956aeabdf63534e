"""Learnt priors as terms of a search, with the curvature that they know of."""

from __future__ import annotations

import torch
from torch import Tensor

from medpfl.attacks.matching.layout import BatchedObjective, Layout
from medpfl.attacks.matching.lbfgs import Preconditioner
from medpfl.attacks.matching.learnt.gaussian import GaussianPrior

FIRST_STEP = 1e-3
"""Share of the prior's own covariance that a search takes for the inverse Hessian before it has seen any."""


def pull(
    prior: GaussianPrior, layout: Layout, centers: Tensor, noise: Tensor | None, strength: float
) -> tuple[BatchedObjective, Preconditioner]:
    """strength / 2 (x - center)' P (x - center) for every image, and the inverse of its matrix.

    centers: (V, pixels), or (1, pixels) for all victims. noise: (V,), the deviation with which the centers are known
    beside what the prior says (`GaussianPrior.precision`); None where they are the prior's own mean. Labels that are
    searched with the images are left alone.
    """
    count, pixels = layout.images[0], layout.pixels
    shared = len(centers) == 1

    def chosen(victims: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        along, otherwise = prior.precision(None if noise is None else noise[victims].repeat_interleave(count))
        return centers if shared else centers[victims], strength * along, strength * otherwise

    def each(variables: Tensor) -> Tensor:
        return variables[:, :pixels].reshape(len(variables) * count, -1)

    def term(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        center, along, otherwise = chosen(victims)
        apart = variables.detach().clone()
        apart[:, :pixels] -= center
        apart[:, pixels:] = 0.0
        slopes = torch.zeros_like(apart)
        slopes[:, :pixels] = prior.scaled(each(apart), along, otherwise).reshape(len(variables), -1)
        return 0.5 * (slopes * apart).sum(dim=1), slopes

    def precondition(gradients: Tensor, victims: Tensor) -> Tensor:
        _, along, otherwise = chosen(victims)
        result = gradients.clone()
        result[:, :pixels] = prior.scaled(each(gradients), 1.0 / along, 1.0 / otherwise).reshape(len(gradients), -1)
        return FIRST_STEP * result

    return term, precondition

"""Local differential privacy that sends one of three numbers: how likely the sent one is, entry by entry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medpfl.attacks.matching.likelihoods.base import Likelihood, View, likelihood_of
from medpfl.core.mechanisms import ThreeValues
from medpfl.defenses.local_dp import probabilities


@likelihood_of(ThreeValues)
def three_values(mechanism: ThreeValues, view: View) -> Likelihood:
    """- sum log P(sent | v) over entries that are not sent as 0, whose probability does not depend on v."""

    def distance(gradients: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor) -> Tensor:
        terms = []
        for gradient, target in zip(gradients, targets, strict=True):
            sent = target * view.unit
            up, down = probabilities(gradient * view.unit, mechanism.epsilon, mechanism.length)
            likely = torch.where(sent > 0, up, down)
            terms.append(torch.where(sent.abs() > mechanism.magnitude / 2, -torch.log(likely), 0.0).sum())
        return (torch.stack(terms) * weights).sum()

    return Likelihood(distance=distance, nats=True)

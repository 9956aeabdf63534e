"""Group consistency (Yin et al. 2021, section 3.4): candidates of one victim are pulled towards what they agree on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.attacks.matching.layout import BatchedObjective, Layout
from medpfl.attacks.matching.registration import registered
from medpfl.core.functional import assignment


@dataclass(frozen=True)
class GroupConsistency:
    """Adds weight * mean((images - consensus)^2) to the objective of every candidate of a victim.

    The consensus of a victim: the images of its candidates are brought into one order (that of the candidate with the
    lowest objective; by least squared error, among images of one label where labels are fixed), their mean is taken,
    each image is registered to it (`registration`, where `register` holds), and the registered ones are averaged.
    A candidate is compared with the consensus in its own order. The consensus is held fixed between two renewals,
    `every` evaluations apart, and has no derivative. Candidates that have ended keep their vote with their last
    iterate unless they diverged.

    labels: (V, K) in the order of every candidate's images, None where the order is open.
    """

    layout: Layout
    weight: float
    every: int
    register: bool
    labels: Tensor | None

    def pull(self, objective: BatchedObjective, targets: Tensor) -> BatchedObjective:
        """The objective with the group term; targets: (A, pixels), one row per candidate that runs."""
        pixels = self.layout.pixels

        def coupled(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
            values, derivatives = objective(variables, victims)
            apart = variables[:, :pixels].detach() - targets
            pulled = derivatives.clone()
            pulled[:, :pixels] += (2.0 * self.weight / pixels) * apart
            return values + self.weight * apart.square().mean(dim=1), pulled

        return coupled

    def targets(self, variables: Tensor, values: Tensor, victims: Tensor, voting: Tensor) -> Tensor:
        """The consensus (A, pixels) that each candidate is pulled towards, in its own order of images.

        variables: (A, n) of all candidates, ended ones included. values: their best objectives (A,). voting: (A,),
        whether a candidate counts; one alone is its own consensus. Computed on the CPU, because it is rarely due.
        """
        images, _ = self.layout.split(variables.detach().cpu())
        result = images.clone()
        owners, vote, scores = victims.tolist(), voting.tolist(), values.tolist()
        for victim in dict.fromkeys(owners):
            rows = [row for row, owner in enumerate(owners) if owner == victim and vote[row]]
            if len(rows) < 2:
                continue
            labels = None if self.labels is None else self.labels[victim].cpu()
            first = min(rows, key=lambda row: scores[row])
            orders = torch.stack([_order(images[row], images[first], labels) for row in rows])
            aligned = torch.stack([images[row][order] for row, order in zip(rows, orders, strict=True)])
            agreed = aligned.mean(dim=0)
            if self.register:
                flat = aligned.flatten(0, 1)
                agreed = registered(flat, agreed.repeat(len(rows), *(1 for _ in agreed.shape[1:]))).reshape(
                    aligned.shape
                )
                agreed = agreed.mean(dim=0)
            for row, order in zip(rows, orders, strict=True):
                result[row] = agreed[order.argsort()]
        return result.flatten(1).to(variables.device)


def _order(images: Tensor, reference: Tensor, labels: Tensor | None) -> Tensor:
    """Which image (K,) of a candidate stands for each image of the reference."""
    cost = (reference.flatten(1)[:, None] - images.flatten(1)[None]).double().square().sum(dim=2)
    if labels is not None:
        several = labels.reshape(len(labels), -1)
        other = (several[:, None] != several[None]).any(dim=2)
        cost = cost + other * (1.0 + cost.sum())
    return assignment(cost)[1]

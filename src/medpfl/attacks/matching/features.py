"""The batched objective of feature inversion: squared distance between a candidate's features and the read ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

from medpfl.attacks.layers import DenseLayer, last_dense, layer_input
from medpfl.attacks.matching.fitting import fitting, most_at_once
from medpfl.attacks.matching.layout import BatchedObjective, once_per_batch
from medpfl.core.domain import Observation
from medpfl.core.functional import total_variation


def feature_objective(
    observations: Sequence[Observation], features: Tensor, total_variation_weight: float
) -> BatchedObjective:
    """|features(image) - f|^2 / |f|^2 + weight * TV(image) for one image per victim, in float64.

    observations: one per victim (a victim that shows several features appears several times). features: (V, inputs).
    Candidates that share a model run as one ordinary batch; batch norm runs on running statistics.
    """
    models = {id(one.model): one.model.to(torch.float64) for one in observations}
    keys = [id(one.model) for one in observations]
    layer = last_dense(observations[0].model)
    assert isinstance(layer, DenseLayer)
    shape = observations[0].model.image_shape
    scale = features.square().sum(dim=1).clamp_min(torch.finfo(torch.float64).tiny)

    def grouped(victims: Tensor) -> list[tuple[int, Tensor]]:
        """Rows of candidates that share a model."""
        owners = [keys[victim] for victim in victims.tolist()]
        members = {key: [row for row, owner in enumerate(owners) if owner == key] for key in dict.fromkeys(owners)}
        return [(key, torch.tensor(rows, device=victims.device)) for key, rows in members.items()]

    @cache
    def at_once() -> int:
        def candidates(count: int) -> tuple[Tensor, Tensor]:
            victims = torch.zeros(count, dtype=torch.int64, device=features.device)
            return batch(features.new_full((count, prod(shape)), 0.5), victims, grouped(victims))

        return fitting(candidates, features.device, most_at_once(features.device))

    @once_per_batch
    def split(victims: Tensor) -> list[tuple[Tensor, list[tuple[int, Tensor]]]]:
        return [(chunk, grouped(chunk)) for chunk in torch.split(victims, at_once())]

    def batch(variables: Tensor, victims: Tensor, groups: list[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
        images = variables.detach().requires_grad_()
        pictures = images.reshape(-1, *shape)
        values = total_variation_weight * total_variation(pictures)
        for key, rows in groups:
            seen = layer_input(models[key], layer, pictures[rows])
            distance = (seen - features[victims[rows]]).square().sum(dim=1) / scale[victims[rows]]
            values = values.index_add(0, rows, distance)
        (derivative,) = torch.autograd.grad(values.sum(), images)
        return values.detach(), derivative

    def objective(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            batch(chunk, *members)
            for chunk, members in zip(torch.split(variables, at_once()), split(victims), strict=True)
        ]
        return torch.cat([value for value, _ in parts]), torch.cat([derivative for _, derivative in parts])

    return objective

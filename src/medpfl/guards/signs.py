"""Signs of a crafted model in what training did to it, beside what its update shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median_low

import torch
from torch import Tensor

from medpfl.core.domain import Batch, GlobalModel, Tensors
from medpfl.guards.layer_views import LayerView


def relative_changes(before: Tensors, change: Tensors) -> dict[str, float]:
    """How far training moved each weight against its size, |change| / |weight|, by name.

    For one SGD step that is learning rate x |gradient| / |weight|, which a crafted layer of tiny weights and large
    gradients cannot hide behind permuted or rescaled units. Vectors and all-zero weights, which have no size, are left
    out.

    >>> relative_changes({"weight": torch.eye(2), "bias": torch.ones(2)}, {"weight": torch.eye(2) / 10, "bias": torch.ones(2)})
    {'weight': 0.1...}
    """
    found = {}
    for name, tensor in before.items():
        if tensor.ndim < 2 or name not in change:
            continue
        size = float(tensor.double().norm())
        if size > 0:
            found[name] = float(change[name].double().norm()) / size
    return found


def thrown_alone(changes: Mapping[str, float]) -> bool:
    """Whether the largest of these relative changes is far above what the lower half of them reaches.

    A step that is too long for an honest net throws all of its layers; a crafted layer of tiny weights flies alone.

    >>> thrown_alone({"bins": 500.0, "body": 0.1, "head": 0.2}), thrown_alone({"one": 500.0, "two": 90.0, "three": 150.0})
    (True, False)
    """
    return max(changes.values()) > THROWN * median_low(changes.values())


THROWN = 30.0
"""Between the largest such ratio of honest nets that diverged and of fishing (4), and the smallest of bins (230)."""


def share_of_dying_units(before: Sequence[LayerView], after: Sequence[LayerView]) -> dict[str, float]:
    """Of the units of each layer that gave any sample a gradient before training, the share that gives none after it.

    A crafted layer of tiny weights is thrown far by its first step, and most of its units never fire again.
    """
    later = {view.path: view for view in after}
    found = {}
    for view in before:
        alive = _alive(view)
        if view.path in later and bool(alive.any()):
            found[view.path] = float((alive & ~_alive(later[view.path])).sum() / alive.sum())
    return found


def surplus_loss(model: GlobalModel, batch: Batch) -> float | None:
    """The mean loss of the received model less that of always answering the batch's own label frequencies.

    At 0 or above it does not beat the class prior: as it should be before any training, and hardly after that. None
    for tasks other than one label per image.
    """
    if model.task.name != "single_label" or batch.targets.is_floating_point():
        return None
    with torch.no_grad():
        output, _ = model.forward(batch.images.to(next(iter(model.parameters.values())).dtype))
        loss = float(model.task.loss(output, batch.targets))
    shares = torch.bincount(batch.targets).double() / len(batch)
    prior = -sum(share * math.log(share) for share in shares.tolist() if share > 0)
    return loss - float(prior)


def _alive(view: LayerView) -> Tensor:
    return (view.errors != 0).any(dim=1)

"""What an update says to have changed, whatever its kind."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from medpfl.core.domain import GlobalModel, Tensors, Update


def sent_change(update: Update, before: Tensors) -> dict[str, Tensor]:
    """What an update says to have changed, in float64: its gradient, or new less old tensors."""
    tensors = {name: tensor.double() for name, tensor in update.trainable.items()}
    if update.kind != "weights":
        return tensors
    return {name: tensor - before[name].double() for name, tensor in tensors.items()}


def with_change(update: Update, before: Tensors, change: Tensors) -> Update:
    """The update that says to have changed `change` instead, in the precision that it had."""
    if update.kind == "weights":
        change = {name: before[name].double() + tensor for name, tensor in change.items()}
    return replace(update, trainable={name: tensor.to(update.trainable[name]) for name, tensor in change.items()})


def with_received_statistics(update: Update, model: GlobalModel) -> Update:
    """The update with the buffers and counters that the client received, so that they tell nothing about its images."""
    buffers = {name: model.buffers[name].to(tensor) for name, tensor in update.buffers.items()}
    counters = {name: model.counters[name] for name in update.counters}
    return replace(update, buffers=buffers, counters=counters)


def norm(tensors: Tensors) -> float:
    """The joint L2 norm.

    >>> norm({"weight": torch.tensor([3.0]), "bias": torch.tensor([4.0])})
    5.0
    """
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors.values()]).sum().sqrt())

"""Trainable tensors, buffers and counters of a state dict, told apart."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from medpfl.core.domain import GlobalModel, Tensors
from medpfl.models.state import matched_state

STATISTICS = ("running_mean", "running_var")


def parted(
    tensors: Tensors, model: GlobalModel | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Trainable tensors, floating buffers, and counters of a state dict, under the state dict's own names.

    With the model as it says; without it integers are counters, `running_mean` and `running_var` buffers, and all
    other floating tensors are trainable, in batch norm layers too.
    """
    if model is not None:
        back = _names(model, tensors)
        chosen = [
            {back[name]: tensors[back[name]] for name in part if name in back}
            for part in (model.parameters, model.buffers, {**model.counters, **model.constants})
        ]
        return chosen[0], chosen[1], chosen[2]
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    buffers = {name: tensor for name, tensor in floating.items() if name.rpartition(".")[2] in STATISTICS}
    trainable = {name: tensor for name, tensor in floating.items() if name not in buffers}
    return trainable, buffers, {name: tensor for name, tensor in tensors.items() if name not in floating}


def _names(model: GlobalModel, tensors: Tensors) -> Mapping[str, str]:
    """The model's name of each tensor -> the name that it has here."""
    found = matched_state(model, tensors, "the message")
    places = {id(tensor): name for name, tensor in tensors.items()}
    return {mine: places[id(tensor)] for mine, tensor in found.items()}

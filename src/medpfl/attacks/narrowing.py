"""Cuts an observation down to the part that a read-out needs, so that nothing else is turned into double precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from medpfl.core.domain import GlobalModel, Observation, Tensors

Rows = Mapping[str, Tensor | None]
"""Names of trainable tensors with the rows (M,) of each that are kept, None for all."""


def narrowed(observation: Observation, rows: Rows) -> Observation:
    """The same observation as if the model had no other trainable tensors and rows.

    What is computed entry by entry from it, as a client's gradient is, is the same as from the whole. The narrowed
    models cannot be run.
    """

    def kept(tensors: Tensors) -> Tensors:
        return {name: tensors[name] if chosen is None else tensors[name][chosen] for name, chosen in rows.items()}

    def part(model: GlobalModel) -> GlobalModel:
        return replace(model, parameters=kept(model.parameters))

    broadcast = observation.broadcast
    return replace(
        observation,
        model=part(observation.model),
        update=replace(observation.update, trainable=kept(observation.update.trainable)),
        broadcast=None if broadcast is None else replace(broadcast, models=tuple(map(part, broadcast.models))),
    )

"""From recorded tensors to what an attack receives."""

from __future__ import annotations

import torch
from torch import Tensor

from medpfl.core.domain import Auxiliary, GlobalModel, Knowledge, Observation, Recipe, Tensors, Update, UpdateKind
from medpfl.core.errors import DataError
from medpfl.core.mechanisms import Mechanism
from medpfl.federation.recording import Recorded, Recording
from medpfl.models.state import apply_state, matched_state


def observed_kind(update: Recorded) -> UpdateKind:
    """What a client sent; weights where nobody said."""
    return update.kind or "weights"


def observe(
    recording: Recording,
    update: Recorded,
    model: GlobalModel,
    recipe: Recipe | None,
    *,
    examples: int | None = None,
    auxiliary: Auxiliary | None = None,
    defense: Mechanism | None = None,
) -> Observation:
    """What an honest but curious server sees of one client in one round.

    model: the architecture, whose tensors are replaced by those that were sent. examples: where the update does not say
    how many images it was computed from. defense: what the attacker knows of it. A recording behind secure aggregation says in `config` how many `clients`
    are in the aggregate. Tensors that were rounded to integers or half precision are taken as they are.

    Raises DataError where what was sent or the number of examples is unknown, ModelError where tensors do not fit.
    """
    where = f"round {update.round}, client {update.client}"
    sent = recording.sent_to(update)
    if sent is None:
        raise DataError(f"{where}: what the server sent was not recorded, so the update cannot be read")
    count = update.examples if update.examples is not None else examples
    if count is None or count < 1:
        raise DataError(f"{where}: the update does not say how many images it was computed from; give --examples")
    received = matched_state(model, sent.tensors, f"what the server sent in {where}")
    held = apply_state(model, received, f"what the server sent in {where}")
    answered = matched_state(model, update.tensors, f"the update of {where}")
    trainable = {name: _float(answered[name]) for name in model.parameters if name in answered}
    if not trainable:
        raise DataError(
            f"{where}: the update holds none of the model's trainable tensors, so there is nothing to attack"
        )
    clients = update.config.get("clients", 1)
    return Observation(
        model=held,
        update=Update(
            kind=observed_kind(update),
            trainable=trainable,
            buffers=_part(answered, model.buffers),
            counters=_part(answered, model.counters),
            examples=count,
        ),
        recipe=recipe,
        threat_model="honest_server",
        knowledge=Knowledge(auxiliary=auxiliary, defense=defense),
        clients=clients if isinstance(clients, int) and clients > 0 else 1,
    )


def _part(tensors: Tensors, like: Tensors) -> dict[str, Tensor]:
    return {name: tensors[name].to(kept.dtype) for name, kept in like.items() if name in tensors}


def _float(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)

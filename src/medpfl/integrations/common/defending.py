"""A defense of updates applied to a state dict that a framework would send."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from medpfl.core.domain import ClientState, GlobalModel, Tensors, Update, UpdateKind
from medpfl.core.errors import SpecError
from medpfl.core.tasks import SingleLabel
from medpfl.defenses import Composition, Defense
from medpfl.defenses.base import registered_name
from medpfl.defenses.order import order_problems
from medpfl.federation.hooks import Hooks
from medpfl.integrations.common.parting import parted

INSIDE = ("model", "batch", "per_example", "gradient", "steps")
"""Hooks that work inside training, which nobody sees who is handed an update."""


def check_outside_training(defense: Defense, what: str) -> None:
    """Refuses what `what` (a mod, a filter) cannot do. Raises SpecError."""
    parts = defense.parts if isinstance(defense, Composition) else (defense,)
    for part in parts:
        inside = [name for name in INSIDE if getattr(type(part), name) is not getattr(Hooks, name)]
        if inside:
            raise SpecError(
                f"defense {registered_name(part)} works inside training ({', '.join(inside)}), which {what} never sees: "
                "train with medpfl.federation.client.client_step(hooks=...) in the app instead"
            )
    if problems := order_problems(parts):
        raise SpecError(problems[0])


def defended(
    defense: Defense,
    sent: Tensors,
    found: Tensors,
    state: ClientState,
    *,
    model: GlobalModel | None = None,
    examples: int | None = None,
    kind: UpdateKind = "weights",
    seed: int | None = None,
) -> tuple[dict[str, Tensor], ClientState]:
    """What is sent in place of `found`, in its names, order and types, and what the defense remembers.

    sent: what the client received; a `delta` needs none of it. Randomness is the operating system's unless a seed is
    given. What the defense does not send is what was received, or zero where nothing was or changes are sent. Raises
    SpecError where nothing can be defended.
    """
    trainable, buffers, counters = parted(found, model)
    if not trainable:
        raise SpecError("the update holds no trainable tensor, so nothing can be defended")
    update = Update(
        kind=kind,
        trainable={name: tensor.to(torch.float32) for name, tensor in trainable.items()},
        buffers=buffers,
        counters=counters,
        examples=examples or 1,
    )
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed + state.rounds)
    hooks = defense.in_round(state.rounds)
    changed, state = hooks.update(update, _received(sent, update), state, generator)
    kept = {**changed.trainable, **changed.buffers, **changed.counters}
    before = {} if kind == "delta" else sent
    result = {name: _like(kept.get(name, before.get(name)), found[name]) for name in found}
    return result, replace(state, rounds=state.rounds + 1)


def _received(sent: Tensors, update: Update) -> GlobalModel:
    """What the client received, as a defense of updates needs it: tensors by name."""
    if update.kind == "delta":
        sent = {**{name: torch.zeros_like(tensor) for name, tensor in update.trainable.items()}, **sent}
    missing = [name for name in update.trainable if name not in sent]
    if missing:
        raise SpecError(f"the update holds '{missing[0]}', which was not received, so its change is unknown")
    return GlobalModel(
        name="received",
        module=torch.nn.Identity(),
        parameters={name: sent[name].to(torch.float32) for name in update.trainable},
        buffers={name: sent[name] for name in update.buffers if name in sent},
        counters={name: sent[name] for name in update.counters if name in sent},
        task=SingleLabel(2),
        image_shape=(1, 1, 1),
    )


def _like(tensor: Tensor | None, found: Tensor) -> Tensor:
    """In the type in which the app sends it."""
    return torch.zeros_like(found) if tensor is None else tensor.to(found.dtype)

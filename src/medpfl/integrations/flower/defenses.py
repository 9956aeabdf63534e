"""The project's defenses as a mod: what a client's answer becomes before it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType

from medpfl.core.domain import ClientState, GlobalModel, Update
from medpfl.core.errors import MedPFLError, SpecError
from medpfl.defenses import Composition, Defense
from medpfl.defenses.base import registered_name
from medpfl.defenses.order import order_problems
from medpfl.federation.hooks import Hooks
from medpfl.integrations.flower.audit_log import AuditLog
from medpfl.integrations.flower.records import arrays_key, examples_of, parted, refused, tensors_of, with_tensors

TENSORS, ROUNDS = "medpfl.defense", "medpfl.defense.rounds"
"""Keys in the client's state: what the defense carries from round to round."""

INSIDE = ("model", "batch", "per_example", "gradient", "steps")
"""Hooks that work inside training, which a mod never sees."""


@dataclass(frozen=True)
class DefenseMod:
    """Applies a defense of updates (noise, clipping, compression, sharing less) to what the app would send.

    Trainable tensors, batch-norm buffers and counters are kept apart: Flower's own local differential privacy takes the
    norm over all arrays, so that a batch counter decides how far weights are clipped. model: the architecture, to know
    which is which; without it names and types decide. With `share: {buffers: false}` buffers and counters are sent as
    they were received. Draws fresh randomness in every round from the operating system unless `seed` is given, for
    tests. Where the defense breaks down nothing is sent. Raises SpecError for defenses that work inside training.
    """

    defense: Defense
    model: GlobalModel | None = None
    seed: int | None = None
    log: AuditLog = field(default_factory=AuditLog)

    def __post_init__(self) -> None:
        """Refuses what a mod cannot do."""
        parts = self.defense.parts if isinstance(self.defense, Composition) else (self.defense,)
        for part in parts:
            inside = [name for name in INSIDE if getattr(type(part), name) is not getattr(Hooks, name)]
            if inside:
                raise SpecError(
                    f"defense {registered_name(part)} works inside training ({', '.join(inside)}), which a mod never sees: "
                    "train with medpfl.federation.client.client_step(hooks=...) in the app instead"
                )
        if problems := order_problems(parts):
            raise SpecError(problems[0])

    def __call__(self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        """The app's answer with the defended update, or an error."""
        if str(message.metadata.message_type).partition(".")[0] != MessageType.TRAIN:
            return call_next(message, context)
        sent = tensors_of(message.content.array_records[arrays_key(message)])
        answer = call_next(message, context)
        if answer.has_error():
            return answer
        try:
            return self._defended(sent, answer, context)
        except MedPFLError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001  an update that could not be defended is not sent
            reason = f"{type(error).__name__}: {error}"
        self.log.decided("defense", "withheld", (reason,))
        return refused(message)

    def _defended(self, sent: dict[str, torch.Tensor], answer: Message, context: Context) -> Message:
        found = tensors_of(answer.content.array_records[arrays_key(answer)])
        trainable, buffers, counters = parted(found, self.model)
        if not trainable:
            raise SpecError("the update holds no trainable tensor, so nothing can be defended")
        update = Update(
            kind="weights",
            trainable={name: tensor.to(torch.float32) for name, tensor in trainable.items()},
            buffers=buffers,
            counters=counters,
            examples=examples_of(answer) or 1,
        )
        received = _received(sent, update)
        state, generator = _state(context), torch.Generator()
        generator.seed() if self.seed is None else generator.manual_seed(self.seed + state.rounds)
        hooks = self.defense.in_round(state.rounds)
        defended, state = hooks.update(update, received, state, generator)
        _keep(context, replace(state, rounds=state.rounds + 1))
        self.log.decided("defense", "passed", (type(self.defense).__name__,))
        kept = {**defended.trainable, **defended.buffers, **defended.counters}
        return with_tensors(answer, {name: _like(kept.get(name, sent.get(name)), found[name]) for name in found})


def _received(sent: dict[str, torch.Tensor], update: Update) -> GlobalModel:
    """What the client received, as a defense of updates needs it: tensors by name."""
    from medpfl.core.tasks import SingleLabel

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


def _like(tensor: torch.Tensor | None, found: torch.Tensor) -> torch.Tensor:
    """In the type in which the app sends it; what the defense does not send is what was received, or zero."""
    return torch.zeros_like(found) if tensor is None else tensor.to(found.dtype)


def _state(context: Context) -> ClientState:
    tensors = context.state.array_records.get(TENSORS)
    rounds = context.state.config_records.get(ROUNDS)
    return ClientState(
        rounds=0 if rounds is None else int(rounds["rounds"]),
        tensors={} if tensors is None else tensors_of(tensors),
    )


def _keep(context: Context, state: ClientState) -> None:
    context.state[TENSORS] = ArrayRecord(dict(state.tensors))
    context.state[ROUNDS] = ConfigRecord({"rounds": state.rounds})

"""The project's defenses as a mod: what a client's answer becomes before it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType

from medpfl.core.domain import ClientState, GlobalModel
from medpfl.core.errors import MedPFLError
from medpfl.defenses import Defense
from medpfl.integrations.common.audit_log import AuditLog
from medpfl.integrations.common.defending import check_outside_training, defended
from medpfl.integrations.flower.records import arrays_key, examples_of, refused, tensors_of, with_tensors

TENSORS, ROUNDS = "medpfl.defense", "medpfl.defense.rounds"
"""Keys in the client's state: what the defense carries from round to round."""


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
        check_outside_training(self.defense, "a mod")

    def __call__(self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        """The app's answer with the defended update, or an error."""
        if str(message.metadata.message_type).partition(".")[0] != MessageType.TRAIN:
            return call_next(message, context)
        try:
            sent = tensors_of(message.content.array_records[arrays_key(message)])
        except MedPFLError as error:
            return self._withheld(message, str(error))
        answer = call_next(message, context)
        if answer.has_error():
            return answer
        try:
            return self._defended(sent, answer, context)
        except MedPFLError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001  an update that could not be defended is not sent
            reason = f"{type(error).__name__}: {error}"
        return self._withheld(message, reason)

    def _withheld(self, message: Message, reason: str) -> Message:
        self.log.decided("defense", "withheld", (reason,))
        return refused(message)

    def _defended(self, sent: dict[str, torch.Tensor], answer: Message, context: Context) -> Message:
        found = tensors_of(answer.content.array_records[arrays_key(answer)])
        result, state = defended(
            self.defense,
            sent,
            found,
            _state(context),
            model=self.model,
            examples=examples_of(answer),
            seed=self.seed,
        )
        _keep(context, state)
        self.log.decided("defense", "passed", (type(self.defense).__name__,))
        return with_tensors(answer, result)


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

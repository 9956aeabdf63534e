"""Mods that stop a round: vetting of the model that came, and the leakage gate on the update that would be sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from flwr.app import ConfigRecord, Context, Message, MessageType

from medpfl.core.domain import Batch, GlobalModel, Recipe, Update
from medpfl.core.errors import InputError, MedPFLError
from medpfl.federation.guarding import Guarding, Received, Trained, Verdict
from medpfl.federation.recipes import check_recipe
from medpfl.guards import LeakageGate, VettingGuard
from medpfl.guards.participation import WithholdLimit, may_take_part
from medpfl.integrations.flower.audit_log import AuditLog
from medpfl.integrations.flower.records import arrays_key, examples_of, parted, refused, tensors_of
from medpfl.models.state import apply_state, matched_state

Call = Callable[[Message, Context], Message]
Images = Callable[[Context], Batch]
"""The client's own images as it trains on them, in order."""

HISTORY = "medpfl.history"
"""Key in the client's state: which rounds were withheld."""


@dataclass(frozen=True)
class VettingMod:
    """Looks at the model of a train message before anything is trained on it, as `medpfl vet` does.

    model: the architecture that was agreed on, whose tensors are never used. images: the client's own; drawn ones are
    taken where None. A round is withheld where the guard says so, where the message cannot be read, and where the guard
    itself breaks down: the server is answered an error without a reason. After `limit` such rounds the client stays
    away until somebody has looked at the log and cleared the history.
    """

    model: GlobalModel
    images: Images | None = None
    guard: Guarding = field(default_factory=VettingGuard)
    recipe: Recipe = field(default_factory=lambda: Recipe(update="weights"))
    limit: WithholdLimit = field(default_factory=WithholdLimit)
    log: AuditLog = field(default_factory=AuditLog)

    def __call__(self, message: Message, context: Context, call_next: Call) -> Message:
        """The app's answer, or an error."""
        if not _trains(message):
            return call_next(message, context)
        if not _takes_part(context, self.limit):
            self.log.decided("vetting", "withheld", ("too many rounds were withheld",))
            return refused(message)
        verdict = _closed("vetting", lambda: self.guard.before(self._received(message, context)))
        if _ends(context, self.log, verdict):
            return refused(message)
        return call_next(message, context)

    def _received(self, message: Message, context: Context) -> Received:
        shape = self.model.image_shape
        batch = Batch(torch.zeros(0, *shape), torch.zeros(0, dtype=torch.int64))
        if self.images is not None:
            batch = self.images(context)
        return Received(_sent_model(self.model, message), batch, self.recipe)


@dataclass(frozen=True)
class GateMod:
    """Reads the client's own update as an attacker would before it leaves, and withholds it if images come back.

    images: the images that were trained on, in order: the client owns the truth, which no server has. recipe: how the
    app trains; it must be what the app really does, or the gate compares with the wrong step. guard: the leakage gate,
    or another guard with a look after training. Put it outermost among the mods, so that it sees what is really sent.
    """

    model: GlobalModel
    images: Images
    recipe: Recipe
    guard: Guarding = field(default_factory=LeakageGate)
    limit: WithholdLimit = field(default_factory=WithholdLimit)
    log: AuditLog = field(default_factory=AuditLog)

    def __post_init__(self) -> None:
        """Refuses a recipe that cannot be carried out, at start rather than in a round."""
        if problems := check_recipe(self.recipe, self.model):
            raise InputError(f"recipe: {problems[0]}")

    def __call__(self, message: Message, context: Context, call_next: Call) -> Message:
        """The app's answer, or an error."""
        if not _trains(message):
            return call_next(message, context)
        if not _takes_part(context, self.limit):
            self.log.decided("leakage_gate", "withheld", ("too many rounds were withheld",))
            return refused(message)
        received: list[Received] = []
        before = _closed("leakage_gate", lambda: received.append(self._received(message, context)))
        if before is not None:
            _ends(context, self.log, before)
            return refused(message)
        answer = call_next(message, context)
        if answer.has_error():
            return answer
        verdict = _closed("leakage_gate", lambda: self.guard.after(self._trained(received[0], answer)))
        return refused(message) if _ends(context, self.log, verdict) else answer

    def _received(self, message: Message, context: Context) -> Received:
        return Received(_sent_model(self.model, message), self.images(context), self.recipe)

    def _trained(self, received: Received, answer: Message) -> Trained:
        tensors = tensors_of(answer.content.array_records[arrays_key(answer)])
        found = matched_state(self.model, tensors, "the update")
        missing = [name for name in self.model.parameters if name not in found]
        if missing:
            raise InputError(f"the update lacks '{missing[0]}', so it cannot be read as an attacker would")
        _, buffers, counters = parted(found, None)
        update = Update(
            kind="weights",
            trainable={name: found[name].to(torch.float32) for name in self.model.parameters},
            buffers=buffers,
            counters=counters,
            examples=examples_of(answer) or len(received.batch),
        )
        places = torch.arange(len(received.batch))
        steps = torch.split(places, self.recipe.batch_size)
        return Trained(received, update, list(steps) * self.recipe.epochs)


def _trains(message: Message) -> bool:
    return bool(str(message.metadata.message_type).partition(".")[0] == MessageType.TRAIN)


def _sent_model(model: GlobalModel, message: Message) -> GlobalModel:
    tensors = tensors_of(message.content.array_records[arrays_key(message)])
    return apply_state(model, matched_state(model, tensors, "the received model"), "the received model")


def _closed(what: str, look: Callable[[], Verdict | None]) -> Verdict | None:
    """A guard that breaks down withholds: what nobody could look at is not trained on and not sent."""
    try:
        return look()
    except MedPFLError as error:
        return Verdict(what, "unusable", True, (str(error),))
    except Exception as error:  # noqa: BLE001  whatever happens, nothing is sent unseen; the reason stands in the log
        return Verdict(what, "unusable", True, (f"the guard broke down ({type(error).__name__}: {error})",))


def _ends(context: Context, log: AuditLog, verdict: Verdict | None) -> bool:
    """Notes a verdict in the log and in the client's history; whether the round ends."""
    ends = verdict is not None and verdict.withholds
    history = [bool(entry) for entry in _history(context)]
    context.state[HISTORY] = ConfigRecord({"withheld": [*history, ends][-1000:]})
    if verdict is not None:
        log.decided(verdict.guard, "withheld" if ends else "passed", verdict.reasons, level=verdict.level)
    return ends


def _history(context: Context) -> list[bool]:
    record = context.state.config_records.get(HISTORY)
    found = [] if record is None else record["withheld"]
    return list(found) if isinstance(found, list) else []


def _takes_part(context: Context, limit: WithholdLimit) -> bool:
    return may_take_part(_history(context), limit)

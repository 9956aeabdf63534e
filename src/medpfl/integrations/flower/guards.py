"""Mods that stop a round: vetting of the model that came, and the leakage gate on the update that would be sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from flwr.app import ConfigRecord, Context, Message, MessageType

from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.errors import InputError
from medpfl.federation.guarding import Guarding, Received
from medpfl.federation.recipes import check_recipe
from medpfl.guards import VettingGuard
from medpfl.guards.participation import WithholdLimit
from medpfl.integrations.common.audit_log import AuditLog
from medpfl.integrations.common.deciding import Decisions, closed, received, searching_gate, trained
from medpfl.integrations.flower.records import arrays_key, examples_of, refused, tensors_of

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
        decisions = Decisions(self.log, self.limit, ContextHistory(context))
        if decisions.stays_away("vetting"):
            return refused(message)
        verdict = closed("vetting", lambda: self.guard.before(self._received(message, context)))
        return refused(message) if decisions.ends(verdict) else call_next(message, context)

    def _received(self, message: Message, context: Context) -> Received:
        batch = None if self.images is None else self.images(context)
        return received(self.model, _tensors(message), batch, self.recipe)


@dataclass(frozen=True)
class GateMod:
    """Reads the client's own update as an attacker would before it leaves, and withholds it if images come back.

    images: the images that were trained on, in order: the client owns the truth, which no server has. recipe: how the
    app trains; it must be what the app really does, or the gate compares with the wrong step. guard: the leakage gate
    with closed forms and idlg, `LeakageGate(attacks=...)` with others, or another guard with a look after training. Put it outermost among the mods, so that it sees what is really sent.
    """

    model: GlobalModel
    images: Images
    recipe: Recipe
    guard: Guarding = field(default_factory=searching_gate)
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
        decisions = Decisions(self.log, self.limit, ContextHistory(context))
        if decisions.stays_away("leakage_gate"):
            return refused(message)
        seen: list[Received] = []
        before = closed("leakage_gate", lambda: seen.append(self._received(message, context)))
        if before is not None:
            decisions.ends(before)
            return refused(message)
        answer = call_next(message, context)
        if answer.has_error():
            return answer
        verdict = closed(
            "leakage_gate", lambda: self.guard.after(trained(seen[0], _tensors(answer), examples_of(answer)))
        )
        return refused(message) if decisions.ends(verdict) else answer

    def _received(self, message: Message, context: Context) -> Received:
        return received(self.model, _tensors(message), self.images(context), self.recipe)


@dataclass(frozen=True)
class ContextHistory:
    """Which rounds were withheld, in the client's state at its SuperNode."""

    context: Context

    def read(self) -> list[bool]:
        """What the state remembers."""
        record = self.context.state.config_records.get(HISTORY)
        found = [] if record is None else record["withheld"]
        return [bool(entry) for entry in found] if isinstance(found, list) else []

    def write(self, withheld: list[bool]) -> None:
        """Remembers it there."""
        self.context.state[HISTORY] = ConfigRecord({"withheld": withheld})


def _trains(message: Message) -> bool:
    return bool(str(message.metadata.message_type).partition(".")[0] == MessageType.TRAIN)


def _tensors(message: Message) -> dict[str, torch.Tensor]:
    return tensors_of(message.content.array_records[arrays_key(message)])

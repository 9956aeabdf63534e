"""Guards around a framework's messages: what cannot be looked at ends the round, and every decision is noted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from medpfl.core.domain import Batch, GlobalModel, Recipe, Tensors, Update
from medpfl.core.errors import InputError, MedPFLError
from medpfl.federation.guarding import Received, Trained, Verdict
from medpfl.guards import LeakageGate
from medpfl.guards.participation import WithholdLimit, may_take_part
from medpfl.integrations.common.audit_log import AuditLog
from medpfl.integrations.common.parting import parted
from medpfl.models.state import apply_state, matched_state

SEARCHED = ("idlg",)
"""Attacks that a gate runs on every update of few images unless it is told otherwise."""

LONGEST_HISTORY = 1000
"""Rounds that a history remembers."""


class History(Protocol):
    """Which of the client's rounds were withheld, oldest first, kept where the framework keeps a client's memory."""

    def read(self) -> list[bool]:
        """All that is remembered."""

    def write(self, withheld: list[bool]) -> None:
        """Remembers this instead."""


@dataclass(frozen=True)
class Decisions:
    """Notes what guards found in the log and the history, and says whether the client goes on."""

    log: AuditLog
    limit: WithholdLimit
    history: History

    def stays_away(self, guard: str) -> bool:
        """Whether too many rounds were withheld, with a line in the log then."""
        if may_take_part(self.history.read(), self.limit):
            return False
        self.log.decided(guard, "withheld", ("too many rounds were withheld",))
        return True

    def ends(self, verdict: Verdict | None) -> bool:
        """Notes a verdict; whether the round ends with it."""
        ends = verdict is not None and verdict.withholds
        self.history.write([*self.history.read(), ends][-LONGEST_HISTORY:])
        if verdict is not None:
            self.log.decided(verdict.guard, "withheld" if ends else "passed", verdict.reasons, level=verdict.level)
        return ends


def searching_gate() -> LeakageGate:
    """The leakage gate with closed forms and a small search."""
    return LeakageGate(attacks=SEARCHED)


def closed(guard: str, look: Callable[[], Verdict | None]) -> Verdict | None:
    """What `look` finds. Where it breaks down the round is withheld: what nobody could look at is not sent."""
    try:
        return look()
    except MedPFLError as error:
        return Verdict(guard, "unusable", True, (str(error),))
    except Exception as error:  # noqa: BLE001  whatever happens, nothing is sent unseen; the reason stands in the log
        return Verdict(guard, "unusable", True, (f"the guard broke down ({type(error).__name__}: {error})",))


def received(model: GlobalModel, tensors: Tensors, batch: Batch | None, recipe: Recipe) -> Received:
    """What a guard looks at before training: the sent tensors in the agreed architecture; without a batch no images."""
    sent = apply_state(model, matched_state(model, tensors, "the received model"), "the received model")
    if batch is None:
        batch = Batch(torch.zeros(0, *model.image_shape), torch.zeros(0, dtype=torch.int64))
    return Received(sent, batch, recipe)


def trained(before: Received, tensors: Tensors, examples: int | None) -> Trained:
    """What a guard looks at after training: the new tensors that would be sent, read as an attacker would."""
    found = matched_state(before.model, tensors, "the update")
    missing = [name for name in before.model.parameters if name not in found]
    if missing:
        raise InputError(f"the update lacks '{missing[0]}', so it cannot be read as an attacker would")
    _, buffers, counters = parted(found, None)
    update = Update(
        kind="weights",
        trainable={name: found[name].to(torch.float32) for name in before.model.parameters},
        buffers=buffers,
        counters=counters,
        examples=examples or len(before.batch),
    )
    places = torch.arange(len(before.batch))
    steps = torch.split(places, before.recipe.batch_size)
    return Trained(before, update, list(steps) * before.recipe.epochs)

"""What an attack is whose server sends crafted models: it prepares the round before it reads the update."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch

from medpfl.attacks.base import Attack
from medpfl.core.domain import Broadcast, GlobalModel, Knowledge, Recipe, UpdateKind
from medpfl.core.memory import machine_memory
from medpfl.core.session import NO_SESSION, Session
from medpfl.federation.channels import Channel

BYTES_PER_ADDED = 42
"""Bytes at the peak per entry that a crafted model has more: sent, trained, received, and read out in float64.

A channel takes its `bytes_per_entry` besides.
"""


@dataclass(frozen=True)
class ServerView:
    """All that a malicious server has when it prepares a round.

    model: what it would send if it were honest. recipe: how clients train, None when withheld. update: the kind of
    what they send. channel: how that reaches the server, with all its public parameters. examples: private images of
    one client. can: what the server may change (keys of `CAPABILITIES`). knowledge: of the granted knowledge what is
    there before the round: auxiliary images and the mechanism of the defense. session: progress and snapshots of
    preparations that take long.
    """

    model: GlobalModel
    recipe: Recipe | None
    update: UpdateKind
    channel: Channel
    examples: int
    threat_model: str
    can: frozenset[str]
    knowledge: Knowledge = field(default_factory=Knowledge)
    session: Session = NO_SESSION

    @property
    def clients(self) -> int:
        """How many clients' updates arrive as one."""
        return self.channel.client_count


class CraftedAttack(Attack):
    """Base of attacks that choose what the server sends: `prepare` once per cell and seed, then `reconstruct`.

    The observation's `broadcast` is what `prepare` returned. All else is as with other attacks.
    """

    sends: ClassVar[str]
    """What the server sends in place of the agreed model: the end of the sentence "It sent ...", for the report."""

    def simulated_steps(self, clients: int) -> int:
        """Upper bound on the client steps that `prepare` plays through, where so many clients' updates arrive as one."""
        return 0

    def takes(self) -> frozenset[str]:
        """What it changes beyond `needs` where the threat model lets it (keys of `CAPABILITIES`)."""
        return frozenset()

    @abstractmethod
    def prepare(self, server_view: ServerView, generator: torch.Generator) -> Broadcast:
        """What the server sends. Raises `AttackFailure` where no crafted model can be made of what it has."""


def why_no_room(what: str, added: int, each: int = BYTES_PER_ADDED) -> str | None:
    """The reason why a model with so many entries more cannot be sent, trained and read here; None if it can.

    each: bytes at the peak of a round per entry.
    """
    needed, there = each * added, machine_memory()
    if needed <= there:
        return None
    return (
        f"{what} takes about {needed / 2**30:.1f} GiB and this machine has {there / 2**30:.1f}: "
        "use fewer of them or smaller images"
    )


CHOSEN_OF_RECIPE = frozenset({"learning_rate", "local_steps", "epochs", "batch_size"})
"""What of a recipe a server with the capability `recipe` chooses: batches follow from how images are divided."""


def beyond_capabilities(view: ServerView, sent: Broadcast) -> str | None:
    """What the server was not able to change and did, half a sentence for a failure; None if it kept to what it can."""
    if sent.recipe is not None:
        agreed = view.recipe
        if "recipe" not in view.can or agreed is None:
            return "a recipe of its own without the capability `recipe`"
        changed = {one.name for one in fields(Recipe) if getattr(agreed, one.name) != getattr(sent.recipe, one.name)}
        if beyond := changed - CHOSEN_OF_RECIPE:
            return f"a recipe that differs in {', '.join(sorted(beyond))}"
    if sent.aggregation and "secure_aggregation" not in view.can:
        return "parameters of the aggregation without the capability `secure_aggregation`"
    if len(sent.models) > 1 and "inconsistent_models" not in view.can:
        return "different models to different clients without the capability `inconsistent_models`"
    return None

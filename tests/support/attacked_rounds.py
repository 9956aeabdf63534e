"""One round under a malicious server, for the tests of attacks that craft models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.attacks.crafted import CraftedAttack, ServerView
from medpfl.core.domain import (
    Auxiliary,
    Batch,
    Broadcast,
    GlobalModel,
    Knowledge,
    Observation,
    Recipe,
    Reconstruction,
)
from medpfl.core.functional import assignment
from medpfl.federation import Channel, Plain, run_round
from medpfl.federation.hooks import NO_HOOKS, Hooks
from medpfl.metrics.scoring import pairwise_mse


@dataclass(frozen=True)
class AttackedRound:
    """What every client held, what the server sent and saw, and what it made of that."""

    clients: tuple[Tensor, ...]
    broadcast: Broadcast
    observation: Observation
    result: Reconstruction

    def found(self, client: int) -> Tensor:
        """What was attributed to this client, or all that came back where nothing is."""
        if self.result.clients is None:
            return self.result.images
        return self.result.images[self.result.clients == client]

    def recovered(self, client: int) -> int:
        """This client's images above 30 dB, one of the candidates attributed to it each."""
        return count_recovered(self.clients[client], self.found(client))


def count_recovered(private: Tensor, found: Tensor, below: float = 1e-3) -> int:
    """Private images with a mean squared error below that, one candidate each."""
    if not len(found):
        return 0
    errors = pairwise_mse(private.double(), found.double())
    rows, columns = assignment(errors)
    return int((errors[rows, columns] < below).sum())


def alone_in_bins(images: Tensor, edges: Tensor) -> Tensor:
    """Which of one client's images are the only ones of mean value in (edge_k, edge_k+1], counted one by one."""
    means = images.double().flatten(1).mean(dim=1)
    bins = [sum(float(mean) > edge for edge in edges.tolist()) for mean in means]
    return torch.tensor([bins.count(own) == 1 and own > 0 for own in bins])


def attacked_round(
    attack: CraftedAttack,
    model: GlobalModel,
    clients: Sequence[Batch],
    auxiliary: Auxiliary,
    recipe: Recipe,
    *,
    channel: Channel | None = None,
    seed: int = 0,
    also: frozenset[str] = frozenset(),
    defense: Hooks = NO_HOOKS,
) -> AttackedRound:
    """The attack prepares the round, the clients train, the channel aggregates, the attack reads.

    also: what the server may change beyond what the attack needs. defense: the clients', whose mechanism it knows.
    """
    channel, generator = channel or Plain(), torch.Generator().manual_seed(seed)
    view = ServerView(
        model=model,
        recipe=recipe,
        update=recipe.update,
        channel=channel,
        examples=len(clients[0]),
        threat_model="malicious_server",
        can=attack.needs() | also,
        knowledge=Knowledge(auxiliary=auxiliary, defense=defense.mechanism()),
    )
    broadcast = attack.prepare(view, generator)
    update = run_round(
        broadcast,
        [(batch, generator) for batch in clients],
        recipe,
        hooks=defense,
        channel=channel,
        generator=generator,
    )
    observation = Observation(
        broadcast.model(0),
        update,
        broadcast.recipe or recipe,
        "malicious_server",
        clients=len(clients),
        broadcast=broadcast,
    )
    (result,) = attack.reconstruct([observation], [generator])
    assert isinstance(result, Reconstruction), result
    return AttackedRound(tuple(batch.images for batch in clients), broadcast, observation, result)

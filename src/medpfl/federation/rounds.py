"""One round: what the server sends, what the clients make of it, what arrives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from medpfl.core.domain import Batch, Broadcast, Recipe, Update
from medpfl.federation.channels import PLAIN, Channel
from medpfl.federation.client import client_step
from medpfl.federation.hooks import NO_HOOKS, Hooks


def run_round(
    broadcast: Broadcast,
    clients: Iterable[tuple[Batch, torch.Generator]],
    recipe: Recipe,
    *,
    hooks: Hooks = NO_HOOKS,
    channel: Channel = PLAIN,
    generator: torch.Generator,
) -> Update:
    """What arrives when clients train what they were sent, as they were told to, on their private images under a defense.

    clients: images and randomness (orders, defense) of each, the victim first; they train one after the other.
    recipe, channel: as agreed; a broadcast may carry others. generator: the channel's randomness. Raises as `client_step`
    and `Channel.told` do.
    """
    told = broadcast.recipe or recipe

    def updates() -> Iterator[Update]:
        for number, (batch, own) in enumerate(clients):
            yield client_step(broadcast.model(number), batch, told, hooks=hooks, generator=own)[0]

    return channel.told(broadcast.aggregation).send(updates(), generator)

"""One round of one victim: what the server sends, what the client makes of it, what arrives."""

from __future__ import annotations

import torch

from medpfl.core.domain import Batch, ClientState, GlobalModel, Recipe, Update
from medpfl.federation.channels import PLAIN, Channel
from medpfl.federation.client import client_step
from medpfl.federation.hooks import NO_HOOKS, Hooks


def run_round(
    model: GlobalModel,
    batch: Batch,
    recipe: Recipe,
    *,
    hooks: Hooks = NO_HOOKS,
    channel: Channel = PLAIN,
    state: ClientState | None = None,
    generator: torch.Generator,
) -> Update:
    """What arrives when a client trains the broadcast `model` on its private `batch` under a defense.

    The generator is the round's randomness (defense and channel). Raises as `client_step` does.
    """
    update, _ = client_step(model, batch, recipe, hooks=hooks, state=state, generator=generator)
    return channel.send([update], generator)

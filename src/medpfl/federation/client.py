"""The client step: one pure function, used by clients and by attackers that simulate them."""

from __future__ import annotations

import torch

from medpfl.core.domain import Batch, ClientState, GlobalModel, Recipe, Update
from medpfl.federation.hooks import NO_HOOKS, Hooks


def client_step(
    model: GlobalModel,
    batch: Batch,
    recipe: Recipe,
    *,
    hooks: Hooks = NO_HOOKS,
    state: ClientState | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Update, ClientState]:
    """Trains `model` on `batch` as `recipe` says and returns what is sent. Pure and differentiable in the images."""
    raise NotImplementedError

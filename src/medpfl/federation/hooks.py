"""Where a defense can reach into a client's round. `Hooks` itself changes nothing: defenses override what they need."""

from __future__ import annotations

import torch

from medpfl.core.domain import Batch, ClientState, GlobalModel, Tensors, Update
from medpfl.core.mechanisms import Mechanism, Unchanged


class Hooks:
    """The identity. A subclass overrides any of the methods; it keeps no state on itself (use `ClientState`).

    Order within a round: `model` once, then for every local step `batch` and `per_example` (only if
    `clips_per_example` is true), then `update` once before the channel.
    """

    clips_per_example: bool = False
    """Whether the client step must compute per-example gradients and hand them to `per_example`."""

    def model(self, model: GlobalModel) -> GlobalModel:
        """The model that the client trains instead of the one it received."""
        return model

    def batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch that a local step uses instead of the client's own."""
        return batch

    def per_example(self, gradients: Tensors, generator: torch.Generator) -> Tensors:
        """Per-example gradients, each (N, *shape), to the step's gradient (*shape)."""
        return {name: gradient.mean(dim=0) for name, gradient in gradients.items()}

    def update(self, update: Update, state: ClientState, generator: torch.Generator) -> tuple[Update, ClientState]:
        """The update that is sent, and the client's state for the next round."""
        return update, state

    def mechanism(self) -> Mechanism:
        """What an adversary who knows the defense is told."""
        return Unchanged()

    def warnings(self) -> tuple[str, ...]:
        """Sentences that must stand beside every result of this defense."""
        return ()


NO_HOOKS = Hooks()

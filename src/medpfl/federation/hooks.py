"""Where a defense can reach into a client's round. `Hooks` itself changes nothing: defenses override what they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.core.domain import Batch, ClientState, GlobalModel, Recipe, Tensors, Update
from medpfl.core.guarantees import Guarantee
from medpfl.core.mechanisms import Mechanism, Unchanged


@dataclass(frozen=True)
class Step:
    """One local step: the model before it, the batch that it takes, the recipe, and the gradient of the mean loss."""

    model: GlobalModel
    batch: Batch
    recipe: Recipe
    gradients: Tensors


class Hooks:
    """The identity. A subclass overrides any of the methods; it keeps no state on itself (use `ClientState`).

    Order within a round: `in_round` and `steps` once; for every local step `batch`, `per_example` (only if
    `clips_per_example` is true) and `gradient`; then `update` once before the channel, and behind it `aggregated` by the
    server. `model` is applied before any training, by whoever runs the federation: server, clients and adversary all have
    the model that it gives.
    """

    clips_per_example: bool = False
    """Whether the client step must compute per-example gradients and hand them to `per_example`."""

    pins_agreement: bool = False
    """Whether clients train and aggregate as agreed, whatever recipe or parameters of the channel the server tells."""

    @property
    def changes_model(self) -> bool:
        """Whether `model` changes the architecture."""
        return type(self).model is not Hooks.model

    def model(self, model: GlobalModel) -> GlobalModel:
        """The model of the federation in place of the one that was given; agreed before training, known to everybody."""
        return model

    def in_round(self, number: int) -> Hooks:
        """The hooks of the client's round with this number, counted from 0; the client step asks for them."""
        return self

    def steps(self, images: int, recipe: Recipe, generator: torch.Generator) -> Sequence[Tensor] | None:
        """Which of the client's images each local step takes: places (n,) int64, n may be 0; None as the recipe says."""
        return None

    def batch(self, batch: Batch, model: GlobalModel, generator: torch.Generator) -> Batch:
        """The batch that a local step on `model` uses instead of the client's own; targets may become what the task
        encodes labels as, float (N, classes)."""
        return batch

    def per_example(self, gradients: Tensors, recipe: Recipe, generator: torch.Generator) -> Tensors:
        """Per-example gradients, each (N, *shape), to the step's gradient (*shape). N may be 0.

        `recipe.batch_size` is the number of images that a step takes, or takes on average where `steps` draws them.
        """
        return {name: gradient.mean(dim=0) for name, gradient in gradients.items()}

    def gradient(self, step: Step, generator: torch.Generator) -> Tensors:
        """The gradient of a local step, before the recipe's own clipping."""
        return step.gradients

    def update(
        self, update: Update, model: GlobalModel, state: ClientState, generator: torch.Generator
    ) -> tuple[Update, ClientState]:
        """The update that is sent, and the client's state for the next round. `model`: what the client received."""
        return update, state

    def aggregated(self, update: Update, clients: int, generator: torch.Generator) -> Update:
        """What the server learns from, given the mean of so many clients' updates. Whoever is at the server sees the mean."""
        return update

    def mechanism(self) -> Mechanism:
        """What an adversary who knows the defense is told."""
        return Unchanged()

    def warnings(self) -> tuple[str, ...]:
        """Sentences that must stand beside every result of this defense."""
        return ()

    def refusals(self, model: GlobalModel, recipe: Recipe) -> list[str]:
        """Reasons why the defense cannot or must not be applied here, each with a way out; empty if it can."""
        return []

    def guarantee(self, recipe: Recipe, images: int) -> Guarantee | None:
        """What a round of a client with so many images releases, as data; None where nothing is guaranteed."""
        return None


NO_HOOKS = Hooks()

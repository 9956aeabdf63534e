"""Where a client can stop a round. `Guarding` itself stops nothing: guards override what they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from medpfl.core.domain import Batch, GlobalModel, Recipe, Update

Level = Literal["passed", "unusable", "leaks", "crafted"]
"""What a guard found, from harmless to worst. `unusable`: what nobody should send, such as numbers that are not finite
or an update of a training that diverged."""

LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Received:
    """What a client has before it trains: the model that came, its own images and how it is to train.

    others: what the other clients of the round received; of these a client may learn digests, over a channel that the
    server does not control. agreed: the model that was agreed on, as the client builds it itself, with the values of
    the last round that it trusts.
    """

    model: GlobalModel
    batch: Batch
    recipe: Recipe
    others: tuple[GlobalModel, ...] = ()
    agreed: GlobalModel | None = None


@dataclass(frozen=True)
class Trained:
    """What a client has after training, before it sends: the same, the update, and what it is computed from.

    all_steps: the places of the images that each local step took, over all epochs.
    """

    received: Received
    update: Update
    all_steps: Sequence[Tensor]

    @property
    def steps(self) -> tuple[Tensor, ...]:
        """The places of the images that each local step of the first epoch took."""
        return tuple(self.all_steps[: self.received.recipe.local_steps])


@dataclass(frozen=True)
class Verdict:
    """What one guard found and what it does. It stays with the client: the server learns at most that nothing came.

    guard: its name. withholds: whether the round ends here for this client. reasons: sentences, the weightiest first.
    """

    guard: str
    level: Level
    withholds: bool
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line: what was found and why."""
        return f"{self.guard}: {self.level}" + (f" ({'; '.join(self.reasons)})" if self.reasons else "")


def worst(verdicts: Sequence[Verdict]) -> Level:
    """The worst level of several verdicts.

    >>> worst([Verdict("one", "crafted", True), Verdict("other", "leaks", True)])
    'crafted'
    """
    return max((verdict.level for verdict in verdicts), key=LEVELS.index, default="passed")


class Guarding:
    """Looks at nothing. A subclass overrides either method or both; it keeps no state on itself."""

    def before(self, received: Received) -> Verdict | None:
        """Looks at the received model before any training on it; None if this guard does not."""
        return None

    def after(self, trained: Trained) -> Verdict | None:
        """Looks at the update before it is sent; None if this guard does not."""
        return None


NO_GUARD = Guarding()

"""How candidates lie in vectors, and the form of every batched objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from torch import Tensor

from medpfl.core.tasks import Task

T = TypeVar("T")

BatchedObjective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Variables (A, n) and the victim of each row (A,) -> values (A,) and derivatives (A, n)."""

CANNOT = (RuntimeError, NotImplementedError, TypeError, ValueError)
"""What PyTorch raises where a derivative, a precision or a batching rule is missing."""


@dataclass(frozen=True)
class Layout:
    """How a candidate's variables lie in one vector: images (K, C, *spatial), then logits (K, *logits) if any.

    logits: (classes,) for labels, (classes, *spatial) for masks, empty where these are fixed.
    """

    images: tuple[int, ...]
    logits: tuple[int, ...] = ()

    @property
    def pixels(self) -> int:
        """Entries that belong to the images."""
        return prod(self.images)

    @property
    def size(self) -> int:
        """All entries."""
        return self.pixels + (self.images[0] * prod(self.logits) if self.logits else 0)

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor | None]:
        """(..., n) -> images (..., K, C, *spatial) and logits (..., K, *logits), None where labels are fixed."""
        leading = flat.shape[:-1]
        images = flat[..., : self.pixels].reshape(*leading, *self.images)
        if not self.logits:
            return images, None
        return images, flat[..., self.pixels :].reshape(*leading, self.images[0], *self.logits)

    def targets(self, task: Task, logits: Tensor) -> Tensor:
        """Logits (..., K, *logits) as targets: sigmoid for independent classes, else softmax over the classes."""
        return logits.sigmoid() if task.name == "multi_label" else logits.softmax(dim=-len(self.logits))


def once_per_batch(prepare: Callable[[Tensor], T]) -> Callable[[Tensor], T]:
    """`prepare(victims)`, kept as long as it is asked for the same tensor, that is, while the same candidates run.

    What is read back from a device there is not read back in every evaluation.
    """
    kept: list[tuple[Tensor, T]] = []

    def prepared(victims: Tensor) -> T:
        if not kept or kept[0][0] is not victims:
            kept.clear()
            kept.append((victims, prepare(victims)))
        return kept[0][1]

    return prepared

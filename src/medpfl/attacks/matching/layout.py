"""How candidates lie in vectors, and the form of every batched objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from torch import Tensor

from medpfl.core.tasks import Task

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

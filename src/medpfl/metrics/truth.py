"""Private images and labels. Only scoring receives them; no attack can import this module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GroundTruth:
    """What a victim really holds: images (N, C, *spatial) in [0, 1], labels, and pseudonymous item names.

    masks: int64 (N, *spatial) where the model is trained with them, None otherwise.
    """

    images: Tensor
    labels: Tensor
    items: tuple[str, ...]
    masks: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """What the client trains on: masks where there are any, else labels."""
        return self.labels if self.masks is None else self.masks

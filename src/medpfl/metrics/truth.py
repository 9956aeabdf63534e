"""Private images and labels. Only scoring receives them; no attack can import this module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GroundTruth:
    """What a victim really holds: images (N, C, *spatial) in [0, 1], labels, and pseudonymous item names.

    masks: int64 (N, *spatial) where the model is trained with them, None otherwise. clients: whose each image is; 0 is
    the victim, as are all where it is empty.
    """

    images: Tensor
    labels: Tensor
    items: tuple[str, ...]
    masks: Tensor | None = None
    clients: tuple[int, ...] = ()

    def client(self, position: int) -> int:
        """Whose the image at that position is."""
        return self.clients[position] if self.clients else 0

    def part(self, positions: Sequence[int]) -> GroundTruth:
        """The images at these positions, in this order."""
        chosen = list(positions)
        return GroundTruth(
            images=self.images[chosen],
            labels=self.labels[chosen],
            items=tuple(self.items[position] for position in chosen),
            masks=None if self.masks is None else self.masks[chosen],
            clients=tuple(self.client(position) for position in chosen),
        )

    @property
    def targets(self) -> Tensor:
        """What the client trains on: masks where there are any, else labels."""
        return self.labels if self.masks is None else self.masks

"""Private images and labels. Only scoring receives them; no attack can import this module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GroundTruth:
    """What a victim really holds: images (N, C, *spatial) in [0, 1], labels, and pseudonymous item names."""

    images: Tensor
    labels: Tensor
    items: tuple[str, ...]

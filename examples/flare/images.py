"""The sites' own images: what trains on them, and what their filters compare with."""

from __future__ import annotations

from brain.task import client_images, round_images
from torch import Tensor

HELD = 8
"""Images that a site has."""


def site_images(site: str, round: int | None, data: str = "", count: int = 1) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 32, 32) and labels on which `site-1`, `site-2`, ... trains in a round, counted from 0."""
    images, labels = client_images(data, int(site.rpartition("-")[2]) - 1, HELD)
    return round_images(images, labels, (round or 0) + 1, count)

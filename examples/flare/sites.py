"""What the sites have: their own images, on which they train and with which their filters compare, and the nets."""

from __future__ import annotations

import torch
from brain.task import SIZE, Net, client_images, round_images
from torch import Tensor, nn

HELD = 8
"""Images that a site has."""


class LeNet(Net):
    """The net of the examples. FLARE's server makes it anew from its class, so that it brings its own seed."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()


class Dense(nn.Module):
    """A net whose first layer is dense, so that single images stand in its gradient."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.first, self.last = nn.Linear(SIZE * SIZE, 64), nn.Linear(64, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, 2)."""
        scores: Tensor = self.last(torch.tanh(self.first(images.flatten(1))))
        return scores


NETS = {"lenet": LeNet, "dense": Dense}
NAMES = {"lenet": "sites:LeNet", "dense": "sites:Dense"}
"""As replay and filters name them."""


def site_images(site: str, round: int | None, data: str = "", count: int = 1) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 32, 32) and labels on which `site-1`, `site-2`, ... trains in a round, counted from 0."""
    images, labels = client_images(data, int(site.rpartition("-")[2]) - 1, HELD)
    return round_images(images, labels, (round or 0) + 1, count)

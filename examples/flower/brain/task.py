"""Model, data and training of the example: what any user's own app has."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZE = 32
HELD_OUT = 32
"""Images that the server judges the model on."""


class Net(nn.Module):
    """A LeNet with smooth activations for images (N, 1, 32, 32) in [0, 1], two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 12, 5, stride=2, padding=2), nn.Tanh(),
            nn.Conv2d(12, 12, 5, stride=2, padding=2), nn.Tanh(),
            nn.Conv2d(12, 12, 5, padding=2), nn.Tanh(),
        )  # fmt: skip
        self.head = nn.Linear(768, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, 2)."""
        return self.head(self.features(images).flatten(1))


def initial_model(seed: int = 0) -> Net:
    """The same first model everywhere."""
    torch.manual_seed(seed)
    return Net()


@cache
def load_images(folder: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images and labels (1: tumor), in a fixed mixed order; drawn ones where no folder is named."""
    from medpfl.data import FolderReader, PhantomReader, load_dataset

    reader: Any = FolderReader(path=Path(folder)) if folder else PhantomReader(kind="brain", count=96)
    data = load_dataset(reader, name="brain", size=SIZE, channels=1)
    labels = (data.targets != data.class_names.index("no_tumor")).to(torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return data.images[order], labels[order]


def held_out(folder: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The server's images."""
    images, labels = load_images(folder, seed)
    return images[:HELD_OUT], labels[:HELD_OUT]


def client_images(folder: str, partition: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One client's own images."""
    images, labels = load_images(folder, seed)
    first = HELD_OUT + partition * count
    if first + count > len(images):
        raise ValueError(f"client {partition} would need images {first} to {first + count}, there are {len(images)}")
    return images[first : first + count], labels[first : first + count]


def round_images(images: Tensor, labels: Tensor, number: int, count: int) -> tuple[Tensor, Tensor]:
    """The images that a client trains on in one round: the next ones, over and over."""
    places = (torch.arange(count) + (number - 1) * count) % len(images)
    return images[places], labels[places]


def train(model: Net, images: Tensor, labels: Tensor, batch_size: int, learning_rate: float) -> float:
    """Plain SGD, one pass in order; returns the last loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    loss = torch.zeros(())
    for start in range(0, len(images), batch_size):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(
            model(images[start : start + batch_size]), labels[start : start + batch_size]
        )
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def judge(model: Net, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Loss, balanced accuracy and AUC."""
    scores = model(images)
    margin, positive = scores[:, 1] - scores[:, 0], labels == 1
    rates = [((margin > 0) == positive)[positive == side].float().mean() for side in (True, False)]
    pairs = (margin[positive][:, None] - margin[~positive][None, :]).sign()
    return {
        "loss": float(nn.functional.cross_entropy(scores, labels)),
        "balanced_accuracy": float(sum(rates) / 2),
        "auc": float((pairs + 1).mean() / 2),
    }

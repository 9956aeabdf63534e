"""Images for the runs: small real sets and drawings, of which every run draws its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from medpfl.core.domain import Batch
from medpfl.data import Dataset, FolderReader, MedMnistReader, PhantomReader, Reader, load_dataset

DRAWINGS = 300
"""Phantoms that are drawn once per process."""


@dataclass(frozen=True)
class Source:
    """Where images come from, and how large they are made."""

    reader: Reader
    side: int
    channels: Literal[1, 3]


def sources(folder: Path | None) -> dict[str, Source]:
    """Sets by name; without a folder of real images the drawings only."""
    found = {
        "chest_drawn": Source(PhantomReader(kind="chest", count=DRAWINGS, resolution=28, seed=7), 28, 1),
        "brain_drawn": Source(PhantomReader(kind="brain", count=DRAWINGS, resolution=32, seed=7), 32, 1),
        "skin_drawn": Source(PhantomReader(kind="skin", count=DRAWINGS, resolution=32, seed=7), 32, 3),
    }
    if folder is None:
        return found
    small = folder / "medmnist"
    return {
        **found,
        "pneumonia": Source(MedMnistReader(path=small / "pneumoniamnist_subset.npz"), 28, 1),
        "skin": Source(MedMnistReader(path=small / "isic2017_28.npz"), 28, 3),
        "body_parts": Source(MedMnistReader(path=small / "mednist_64_subset.npz"), 32, 1),
        "brain": Source(FolderReader(path=folder / "brain_mri"), 32, 1),
    }


@cache
def loaded(name: str, folder: Path | None) -> Dataset:
    """The whole set in memory; the same for all runs of the process."""
    source = sources(folder)[name]
    return load_dataset(source.reader, name=name, size=source.side, channels=source.channels)


@dataclass(frozen=True)
class Draw:
    """Places of a run's own images: of one client, to train the model on, and those that a server owns, no place twice."""

    data: Dataset
    client: Tensor
    others: Tensor
    auxiliary: Tensor

    def batch(self, places: Tensor, masks: bool = False) -> Batch:
        """Images at these places with their labels, or with their masks."""
        targets = self.data.masks if masks else self.data.targets
        assert targets is not None  # masks are asked of drawings only
        return Batch(self.data.images[places], targets[places])


def drawn(name: str, folder: Path | None, client: int, generator: torch.Generator) -> Draw:
    """`client` images for the client; half of the rest each for training and for the server, at most 512 each."""
    data = loaded(name, folder)
    order = torch.randperm(len(data), generator=generator)
    rest = order[client:]
    half = min(512, len(rest) // 2)
    return Draw(data, order[:client], rest[:half], rest[half : 2 * half])

"""Images for benchmarks: real ones where they are, phantoms of the same kind where they are not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from medpfl.data import Dataset, PhantomReader, load_dataset
from medpfl.data.readers.folder import FolderReader

ROOT = Path(os.environ.get("MEDPFL_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data")))
"""Folder of the real data sets."""

KINDS: dict[str, tuple[Literal["brain", "chest", "skin"], Literal[1, 3]]] = {
    "brain_mri": ("brain", 1),
    "covid_cxr": ("chest", 1),
    "melanoma": ("skin", 3),
}
"""Phantoms that stand in for a data set, and how many channels its images have."""


def load_pictures(root: Path, name: str, size: int, channels: Literal[1, 3] | None = None) -> tuple[Dataset, str]:
    """All images of a folder of `root`, square, and what to call them in a table; drawn ones where it is missing."""
    kind, own = KINDS[name]
    found = (root / name).is_dir()
    reader = FolderReader(path=root / name) if found else PhantomReader(kind=kind, count=64, resolution=2 * size)
    dataset = load_dataset(reader, name=name, size=size, channels=channels or own, aspect="squash")
    return dataset, name if found else f"{kind} phantoms"

"""MedMNIST files: npz archives with the published keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.core.domain import Sample
from medpfl.core.errors import DataError
from medpfl.data.base import READERS, Reader, spread_evenly
from medpfl.data.named import class_names_of_file
from medpfl.data.npz import SPLITS, SplitName, holds_volumes, split_images, split_labels
from medpfl.data.pixels import full_scale, to_image, to_volume


@READERS.register(
    "medmnist",
    summary="a MedMNIST npz file (2D or 3D, any size): keys train_images, train_labels, val_..., test_...",
    paper="Yang et al., MedMNIST v2, Scientific Data 10, 41, 2023",
    limits="patients are not known",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class MedMnistReader(Reader):
    """Reads images uint8 (N, H, W), (N, H, W, 3) or cubes (N, S, S, S) and labels (N, 1), or (N, classes) for several labels.

    Nothing in the file is unpickled. The item is `file#split/index`.
    """

    path: Annotated[Path, Field(description="the npz file")]
    splits: Annotated[tuple[SplitName, ...], Field(min_length=1, description="which splits, in this order")] = SPLITS
    classes: Annotated[
        tuple[str, ...], Field(description="class names; default: the published ones by file name, else the numbers")
    ] = ()

    @property
    def multi_label(self) -> bool:
        """True for label rows with more than one entry."""
        return int(self._labels().shape[1]) > 1

    def class_names(self) -> tuple[str, ...]:
        """Given names, the published ones for a file such as `pathmnist_64.npz`, else the numbers as text."""
        labels = self._labels()
        count = labels.shape[1] if labels.shape[1] > 1 else int(labels.max(initial=0)) + 1
        names = self.classes or class_names_of_file(self.path, count)
        if len(names) < count or (labels.shape[1] > 1 and len(names) != count):
            raise DataError(f"'{self.path}' has {count} classes and {len(names)} names are given")
        return names

    def read(self, maximum: int | None = None) -> Iterator[Sample]:
        """Images in the order of `splits` and of the file."""
        rows = self._labels()
        chosen = set(spread_evenly([tuple(row) for row in rows.tolist()], maximum))
        position = 0
        for split in self.splits:
            images, labels = split_images(self.path, split), split_labels(self.path, split)
            volumes = holds_volumes(images)
            if len(images) != len(labels):
                raise DataError(f"'{self.path}': {split} has {len(images)} images and {len(labels)} labels")
            for index, (image, row) in enumerate(zip(images, labels.tolist(), strict=True)):
                if position in chosen:
                    item = f"{self.path.name}#{split}/{index}"
                    values = full_scale(image)
                    shown = to_volume(values, item) if volumes else to_image(values, item)
                    yield Sample(shown, row[0] if len(row) == 1 else tuple(row), item)
                position += 1

    def _labels(self) -> NDArray[Any]:
        parts = [split_labels(self.path, split) for split in self.splits]
        if len({part.shape[1] for part in parts}) > 1:
            raise DataError(f"'{self.path}': the splits have label rows of different lengths")
        return np.concatenate(parts)

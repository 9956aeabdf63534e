"""Procedural images for tests, examples and machines without data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.core.domain import Sample
from medpfl.core.seeding import derive_seed
from medpfl.data.base import READERS, Reader, spread_evenly
from medpfl.data.phantoms import BRAIN_CLASSES, CHEST_CLASSES, SKIN_CLASSES, draw_brain, draw_chest, draw_skin
from medpfl.data.pixels import to_image

_KINDS = {
    "brain": (BRAIN_CLASSES, "tumor", draw_brain),
    "chest": (CHEST_CLASSES, "lungs", draw_chest),
    "skin": (SKIN_CLASSES, "lesion", draw_skin),
}
"""Classes, what the masks show, and what draws it."""


@READERS.register(
    "phantom",
    summary="procedural images that look like brain MRI, chest films or skin lesions, with masks of tumor, lungs or lesion; needs no data",
    limits="drawings, not patients: results on them say nothing about real images",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class PhantomReader(Reader):
    """Draws `count` images: brain and chest in gray, skin in color, classes taking turns.

    Images of one patient share the anatomy and the class, and differ in pose, exposure and noise. The same seed
    gives the same anatomies at every resolution.
    """

    kind: Annotated[Literal["brain", "chest", "skin"], Field(description="what is drawn")] = "brain"
    count: Annotated[int, Field(ge=1, description="number of images")] = 64
    resolution: Annotated[int, Field(ge=8, le=2048, description="pixels per axis as drawn")] = 64
    patients: Annotated[int | None, Field(ge=1, description="number of patients; default: unknown, one per image")] = (
        None
    )
    seed: Annotated[int, Field(description="seed of all images")] = 0

    def class_names(self) -> tuple[str, ...]:
        """Classes of the kind, those of `brain_mri`, `covid_cxr` and `melanoma`."""
        return _KINDS[self.kind][0]

    def mask_names(self) -> tuple[str, ...]:
        """Background, and what is to be segmented: tumor, lungs or lesion."""
        return ("background", _KINDS[self.kind][1])

    def read(self, maximum: int | None = None) -> Iterator[Sample]:
        """Images in the order of their numbers."""
        labels = [self._patient(number) % len(self.class_names()) for number in range(self.count)]
        for number in spread_evenly(labels, maximum):
            patient = self._patient(number)
            drawing = _KINDS[self.kind][2](
                labels[number],
                self.resolution,
                np.random.default_rng(derive_seed("phantom patient", self.seed, self.kind, patient)),
                np.random.default_rng(derive_seed("phantom image", self.seed, self.kind, number)),
            )
            item = f"{self.kind}#{number}"
            key = None if self.patients is None else f"{self.kind}-{self.seed}-{patient}"
            mask = torch.from_numpy(drawing.region.astype(np.int64))
            yield Sample(to_image(drawing.picture, item), labels[number], item, key, mask=mask)

    def _patient(self, number: int) -> int:
        return number if self.patients is None else number % self.patients

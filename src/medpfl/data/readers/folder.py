"""Folders of PNG and JPEG files: one sub-folder per class, or flat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.domain import Sample
from medpfl.data.base import READERS, Reader, pick
from medpfl.data.listing import Found, classes_of, find_files
from medpfl.data.masks import TWO_CLASSES, check_settings, mask_file, read_mask_file
from medpfl.data.pixels import IMAGE_SUFFIXES, read_image_file


@READERS.register(
    "folder",
    summary="PNG and JPEG files, one sub-folder per class or flat; 8 and 16 bit, gray, color, transparent, palette",
    limits="16-bit color is reduced to 8 bit; transparent images are composited on black; patients are not known",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class FolderReader(Reader):
    """Reads every PNG and JPEG file under `path`, sorted by name; hidden files are left out.

    The first sub-folder is the class; files may lie deeper. A flat folder gives the one class "unlabeled". The item
    is the path relative to the folder. With `mask_path`, every image has a mask for segmentation models.
    """

    path: Annotated[Path, Field(description="folder with one sub-folder per class, a flat folder, or one file")]
    pattern: Annotated[str, Field(description="which files, for instance '*.png' or 'train/*'")] = "*"
    labels: Annotated[Literal["folder", "none"], Field(description="class from the first sub-folder, or none")] = (
        "folder"
    )
    mask_path: Annotated[
        Path | None,
        Field(description="folder of PNG masks, each with its image's relative name; may lie inside `path`"),
    ] = None
    mask_classes: Annotated[
        tuple[str, ...],
        Field(description="names of mask values 0, 1, ...; default: background and, for any other value, foreground"),
    ] = ()

    def __post_init__(self) -> None:
        check_settings(self.mask_path, self.mask_classes)

    def class_names(self) -> tuple[str, ...]:
        """Names of the sub-folders with images, sorted."""
        return classes_of(self._files(), labels=self.labels, root=self.path)[0]

    def mask_names(self) -> tuple[str, ...]:
        """Given names, or background and foreground; none without masks."""
        return () if self.mask_path is None else self.mask_classes or TWO_CLASSES

    def read(self, maximum: int | None = None) -> Iterator[Sample]:
        """Images in the order of their relative paths."""
        files = self._files()
        _, labels = classes_of(files, labels=self.labels, root=self.path)
        for file, label in pick(list(zip(files, labels, strict=True)), labels, maximum):
            yield Sample(read_image_file(file.path), label, file.name, mask=self._mask(file))

    def _mask(self, file: Found) -> Tensor | None:
        if self.mask_path is None:
            return None
        return read_mask_file(mask_file(self.mask_path, file.name, (".png",)), self.mask_names())

    def _files(self) -> list[Found]:
        return find_files(self.path, suffixes=IMAGE_SUFFIXES, pattern=self.pattern, without=self.mask_path)

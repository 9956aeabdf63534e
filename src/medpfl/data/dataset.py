"""A whole data set in memory, at one size and one number of channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from medpfl.core.domain import Sample
from medpfl.core.errors import DataError
from medpfl.core.tasks import MultiLabel, SingleLabel, Task
from medpfl.data.base import Reader
from medpfl.data.resizing import Aspect, resize, resize_mask, to_channels


@dataclass(frozen=True)
class Dataset:
    """Images (N, C, *spatial) in [0, 1] with their targets: int64 (N,), or float (N, classes) for several labels.

    `masks` are int64 (N, *spatial) with classes `mask_names`, where the data has masks. `items` are unique names without patient text. `patients` are opaque keys for splitting, and so are `sites`, one for each
    image or none at all where no reader tells. `notes` say in plain
    sentences what is unusual about the data.
    """

    name: str
    images: Tensor
    targets: Tensor
    items: tuple[str, ...]
    patients: tuple[str | None, ...]
    class_names: tuple[str, ...]
    task: Task
    notes: tuple[str, ...] = ()
    masks: Tensor | None = None
    mask_names: tuple[str, ...] = ()
    sites: tuple[str | None, ...] = ()

    def __len__(self) -> int:
        return int(self.images.shape[0])


def load_dataset(
    reader: Reader,
    *,
    name: str,
    size: int | tuple[int, ...],
    channels: Literal[1, 3],
    aspect: Aspect = "squash",
    maximum: int | None = None,
) -> Dataset:
    """Reads, checks and resizes all images, or `maximum` of them, spread evenly over classes and reading order.

    `size` is the number of pixels per axis (one number: the same for each). Gray becomes color by repetition and
    color becomes gray by the luma weights 0.299, 0.587, 0.114. Masks are resized by nearest neighbor. Raises DataError
    that names the data entry or item: no images, size 0, NaN, values outside [0, 1], a label out of range, an item that
    comes twice, a mask that is missing, of another size, or of an unknown class.
    """
    class_names, multi_label, mask_names = reader.class_names(), reader.multi_label, reader.mask_names()
    images: list[Tensor] = []
    samples: list[Sample] = []
    for sample in reader.read(maximum):
        where = f"data '{name}', item '{sample.item}'"
        _check(sample, len(class_names), multi_label, where)
        _check_mask(sample, len(mask_names), where)
        if images and sample.image.ndim != images[0].ndim:
            raise DataError(f"{where}: images and volumes are mixed; make two data entries of them")
        shape = _shape(size, sample, where)
        images.append(resize(to_channels(sample.image, channels, where), shape, aspect))
        mask = None if sample.mask is None else resize_mask(sample.mask, shape, aspect)
        samples.append(replace(sample, image=images[-1], mask=mask))
    if not samples:
        raise DataError(f"data '{name}' has no images; check its path and options")
    items = tuple(sample.item for sample in samples)
    twice = [item for item, times in Counter(items).items() if times > 1]
    if twice:
        raise DataError(f"data '{name}': item '{twice[0]}' comes more than once; each image needs its own name")
    return Dataset(
        name=name,
        images=torch.stack(images),
        targets=_targets(samples, multi_label),
        items=items,
        patients=tuple(sample.patient for sample in samples),
        class_names=class_names,
        task=MultiLabel(len(class_names)) if multi_label else SingleLabel(max(2, len(class_names))),
        notes=(*reader.notes(), *_constant_notes(samples)),
        masks=torch.stack([sample.mask for sample in samples if sample.mask is not None]) if mask_names else None,
        mask_names=mask_names,
        sites=tuple(sample.site for sample in samples),
    )


def _shape(size: int | tuple[int, ...], sample: Sample, where: str) -> tuple[int, ...]:
    dimensions = sample.image.ndim - 1
    shape = (size,) * dimensions if isinstance(size, int) else tuple(size)
    if len(shape) != dimensions or min(shape) < 1:
        raise DataError(f"{where}: size {size} does not fit an image with {dimensions} axes; give one number per axis")
    return shape


def _check(sample: Sample, classes: int, multi_label: bool, where: str) -> None:
    image = sample.image
    if image.ndim < 2 or image.numel() == 0:
        raise DataError(f"{where}: the image has size 0 {tuple(image.shape)}; expected (C, *spatial)")
    if not bool(torch.isfinite(image).all()):
        raise DataError(f"{where}: the image has NaN or infinite pixels; replace them or remove the image")
    if float(image.min()) < 0.0 or float(image.max()) > 1.0:
        raise DataError(f"{where}: pixels lie in [{image.min():.3g}, {image.max():.3g}]; the reader must give [0, 1]")
    if isinstance(sample.label, int):
        fits = not multi_label and 0 <= sample.label < classes
    else:
        fits = multi_label and len(sample.label) == classes and set(sample.label) <= {0, 1}
    if not fits:
        raise DataError(f"{where}: label {sample.label} does not fit {classes} classes")


def _check_mask(sample: Sample, classes: int, where: str) -> None:
    mask = sample.mask
    if (mask is None) != (classes == 0):
        raise DataError(f"{where}: the image has {'no' if mask is None else 'a'} mask, unlike others; give all or none")
    if mask is None:
        return
    if mask.shape != sample.image.shape[1:]:
        raise DataError(
            f"{where}: the mask has size {'x'.join(map(str, mask.shape))} and the image "
            f"{'x'.join(map(str, sample.image.shape[1:]))}; give a mask of the image's own size"
        )
    if int(mask.min()) < 0 or int(mask.max()) >= classes:
        raise DataError(f"{where}: mask classes {int(mask.min())} to {int(mask.max())} do not fit {classes} names")


def _targets(samples: Sequence[Sample], multi_label: bool) -> Tensor:
    return torch.tensor([sample.label for sample in samples], dtype=torch.float32 if multi_label else torch.int64)


def _constant_notes(samples: Sequence[Sample]) -> tuple[str, ...]:
    constant = [sample.item for sample in samples if bool((sample.image == sample.image.flatten()[0]).all())]
    if not constant:
        return ()
    shown = ", ".join(constant[:3]) + (" ..." if len(constant) > 3 else "")
    return (f"{len(constant)} of {len(samples)} images have one value in all pixels ({shown}).",)

"""Images and nets of `medleak.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import interpolate

from medpfl.core.domain import Batch, GlobalModel
from medpfl.core.seeding import generator
from medpfl.data import Dataset, MedMnistReader, load_dataset
from medpfl.models import build_model

FILES: dict[str, tuple[str, Any]] = {
    "PneumoniaMNIST": ("pneumoniamnist_subset.npz", 1),
    "ISIC 2017 color": ("isic2017_28.npz", 3),
}


@dataclass(frozen=True)
class Division:
    """Images of clients and server for one seed."""

    clients: Batch
    server: Batch
    seed: int


def sets(names: Sequence[str]) -> Iterator[tuple[str, Dataset]]:
    """Real images at 28x28, each once."""
    for name in names:
        file, channels = FILES[name]
        reader = MedMnistReader(path=Path(os.environ["MEDPFL_DATA"], "medmnist", file))
        data = load_dataset(reader, name=name, size=28, channels=channels)
        first = {image.numpy().tobytes(): place for place, image in reversed(list(enumerate(data.images)))}
        places = torch.tensor(sorted(first.values()))
        yield name, replace(data, images=data.images[places], targets=data.targets[places])


def division(data: Dataset, seed: int) -> Division:
    """One half of the images to clients, the other to the server."""
    order = torch.randperm(len(data.images), generator=generator("division", seed))
    held, owned = order[: len(order) // 2], order[len(order) // 2 :]
    return Division(Batch(data.images[held], data.targets[held]), Batch(data.images[owned], data.targets[owned]), seed)


def augmented(held: Batch, seed: int, side: int) -> Batch:
    """Zoomed, resized there and back, and changed in brightness and contrast: no pixel is left on the 8-bit grid."""
    draws = generator("augmented", seed, side)
    images = []
    for image in held.images:
        size = int(torch.randint(20, 28, (), generator=draws))
        smaller = interpolate(image[None], size=(size, size), mode="bilinear", antialias=True)
        back = interpolate(smaller, size=tuple(image.shape[1:]), mode="bicubic")[0]
        shift, factor = (0.1 * (torch.rand(2, generator=draws) - 0.5)).tolist()
        images.append(((back - 0.5) * (1 + factor) + 0.5 + shift).clamp(0, 1))
    return Batch(torch.stack(images), held.targets)


def net(data: Dataset, body: str, seed: int) -> GlobalModel:
    """A LeNet, drawn from uniform(-0.5, 0.5) as in DLG or as PyTorch draws layers by default."""
    draws = generator("net", seed)
    model = build_model("lenet_idlg", image_shape=tuple(data.images.shape[1:]), task=data.task, generator=draws)
    if body == "uniform":
        return model
    fans = {key.rpartition(".")[0]: tensor[0].numel() for key, tensor in model.parameters.items() if tensor.ndim > 1}
    drawn = {
        key: (2 * torch.rand(tensor.shape, generator=draws) - 1) / fans[key.rpartition(".")[0]] ** 0.5
        for key, tensor in model.parameters.items()
    }
    return replace(model, parameters=drawn)

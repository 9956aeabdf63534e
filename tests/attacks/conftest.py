"""Small models, images and observations for the attacks' tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from medpfl.core.domain import GlobalModel, Knowledge, Observation, Recipe, Update
from medpfl.core.tasks import MultiLabel, SingleLabel, Task
from medpfl.data import Dataset, MedMnistReader, PhantomReader, load_dataset
from medpfl.models import prepare

MakeModel = Callable[..., GlobalModel]
MakeObservation = Callable[..., Observation]


@pytest.fixture
def make_model() -> MakeModel:
    """A model with weights from uniform(-0.5, 0.5), or the module's own where `uniform` is false."""

    def make(
        module: nn.Module,
        image_shape: tuple[int, ...],
        classes: int = 3,
        *,
        task: Task | None = None,
        seed: int = 0,
        uniform: bool = True,
        double: bool = False,
    ) -> GlobalModel:
        generator = torch.Generator().manual_seed(seed)
        if uniform:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.uniform_(-0.5, 0.5, generator=generator)
        model = prepare(module, name="small", image_shape=image_shape, task=task or SingleLabel(classes))
        return model.to(torch.float64) if double else model

    return make


@pytest.fixture
def observe() -> MakeObservation:
    """What an eavesdropper sees of one gradient, computed with nothing but autograd."""

    def make(
        model: GlobalModel,
        images: Tensor,
        labels: Tensor,
        *,
        recipe: Recipe | None = None,
        knows: Knowledge | None = None,
    ) -> Observation:
        parameters = {name: tensor.clone().requires_grad_() for name, tensor in model.parameters.items()}
        dtype = next(iter(parameters.values())).dtype
        output = torch.func.functional_call(model.module, {**parameters, **model.buffers}, (images.to(dtype),))
        gradients = torch.autograd.grad(model.task.loss(output, labels), list(parameters.values()))
        update = Update("gradient", dict(zip(parameters, gradients, strict=True)), {}, {}, len(images))
        recipe = recipe or Recipe(batch_size=len(images))
        return Observation(model, update, recipe, "eavesdropper", knows or Knowledge())

    return make


@pytest.fixture
def as_kind() -> Callable[[Observation, Literal["delta", "weights"], float], Observation]:
    """The same gradient sent as a delta or as weights after one SGD step."""

    def convert(observation: Observation, kind: Literal["delta", "weights"], learning_rate: float) -> Observation:
        old = observation.model.parameters
        delta = {name: -learning_rate * gradient for name, gradient in observation.update.trainable.items()}
        tensors = delta if kind == "delta" else {name: old[name] + delta[name] for name in delta}
        recipe = Recipe(update=kind, learning_rate=learning_rate, batch_size=observation.examples)
        update = replace(observation.update, kind=kind, trainable=tensors)
        return replace(observation, update=update, recipe=recipe)

    return convert


@pytest.fixture
def dense_net() -> Callable[..., nn.Module]:
    """Two dense layers; the activation and sizes are chosen by the test."""

    def make(inputs: int, hidden: int, classes: int = 3, activation: nn.Module | None = None) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, hidden), activation or nn.Sigmoid(), nn.Linear(hidden, classes)
        )

    return make


class TokenNet(nn.Module):
    """Images cut into equal tokens in memory order, each embedded by one dense layer, plus a position embedding."""

    def __init__(self, inputs: int, width: int, classes: int, activation: nn.Module, tokens: int = 4) -> None:
        super().__init__()
        self.tokens = tokens
        self.positions = nn.Parameter(torch.empty(1, tokens, width))
        self.embedding = nn.Linear(inputs // tokens, width)
        self.activation = activation
        self.head = nn.Linear(tokens * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.reshape(len(images), self.tokens, -1)
        output: Tensor = self.head(self.activation(self.embedding(patches) + self.positions).flatten(1))
        return output


@pytest.fixture
def token_net() -> Callable[..., nn.Module]:
    """Four tokens and a dense layer over all of them; called as `dense_net`, with the width of a token."""

    def make(inputs: int, width: int, classes: int = 3, activation: nn.Module | None = None) -> nn.Module:
        return TokenNet(inputs, width, classes, activation or nn.Sigmoid())

    return make


@pytest.fixture
def sigmoid_lenet() -> Callable[..., nn.Module]:
    """A LeNet in small: two convolutions with sigmoids and one dense layer."""

    def make(channels: int = 1, size: int = 12, classes: int = 3, width: int = 8) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, width, 5, stride=2, padding=2),
            nn.Sigmoid(),
            nn.Conv2d(width, width, 5, padding=2),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(width * ((size + 1) // 2) ** 2, classes),
        )

    return make


@pytest.fixture
def multi_label() -> Callable[[int], Task]:
    """Independent classes."""
    return MultiLabel


def smooth_images(count: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Images with structure: two soft blobs each, in [0, 1], float32."""
    generator = torch.Generator().manual_seed(seed)
    grids = torch.meshgrid(*(torch.linspace(0, 1, size) for size in shape[1:]), indexing="ij")
    images = torch.zeros(count, *shape)
    for _ in range(2):
        centers = torch.rand(count, shape[0], len(grids), generator=generator)
        heights = 0.2 + 0.3 * torch.rand(count, shape[0], generator=generator)
        expand = (...,) + (None,) * len(grids)
        distance = sum(((grid - centers[:, :, axis][expand]) ** 2 for axis, grid in enumerate(grids)), torch.zeros(()))
        images += heights[expand] * torch.exp(-distance / 0.05)
    return images.clamp(0, 1)


@pytest.fixture
def blobs() -> Callable[..., Tensor]:
    """`smooth_images` for tests."""
    return smooth_images


@pytest.fixture(scope="session")
def films() -> Dataset:
    """Phantoms of chest films, 28x28."""
    return load_dataset(PhantomReader(kind="chest", count=1500, resolution=28), name="films", size=28, channels=1)


@pytest.fixture(scope="session")
def skin() -> Dataset:
    """Phantoms of skin lesions, 28x28 in color."""
    return load_dataset(PhantomReader(kind="skin", count=600, resolution=28), name="skin", size=28, channels=3)


@pytest.fixture(scope="session")
def pneumonia(shared_data: Path) -> Dataset:
    """PneumoniaMNIST, 28x28; skips where it is not there."""
    reader = MedMnistReader(path=shared_data / "medmnist" / "pneumoniamnist_subset.npz")
    return load_dataset(reader, name="pneumonia", size=28, channels=1)

"""A small net, the same as a global model, and random images with labels for the federation's tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from medpfl.core.domain import Batch, GlobalModel
from medpfl.core.tasks import SingleLabel
from medpfl.models import prepare

CLASSES = 3
SHAPE = (2, 6, 6)


class SmallNet(nn.Module):
    """Convolution, batch norm, smooth activation, dense layer."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=not norm)  # before batch norm a bias has no gradient
        self.norm: nn.Module = nn.BatchNorm2d(4, momentum=0.3) if norm else nn.Identity()
        self.fc = nn.Linear(4 * 36, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores."""
        scores: Tensor = self.fc(torch.tanh(self.norm(self.conv(images))).flatten(1))
        return scores


def make_seeded_module(norm: bool = True) -> nn.Module:
    """A float64 module whose batch norm has non-trivial running statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = SmallNet(norm).double()
        if isinstance(module.norm, nn.BatchNorm2d):
            module.norm.running_mean = torch.rand(4, dtype=torch.float64)
            module.norm.running_var = torch.rand(4, dtype=torch.float64) + 0.5
            nn.init.uniform_(module.norm.weight, 0.5, 1.5)
    return module


def make_global_model(module: nn.Module) -> GlobalModel:
    """The module as a global model that keeps its float64 values."""
    model = prepare(module, name="small", image_shape=SHAPE, task=SingleLabel(CLASSES))
    exact = dict(module.named_parameters()) | dict(module.named_buffers())
    model = model.to(torch.float64)
    for group in (model.parameters, model.buffers):
        for name in group:
            group[name].copy_(exact[name].detach())
    return model


def make_data(count: int) -> Batch:
    """Random images with labels."""
    generator = torch.Generator().manual_seed(count)
    images = torch.rand((count, *SHAPE), dtype=torch.float64, generator=generator)
    return Batch(images, torch.randint(0, CLASSES, (count,), generator=generator))


@pytest.fixture
def seeded_module() -> Callable[..., nn.Module]:
    """Makes a float64 module whose batch norm has non-trivial running statistics, or without batch norm."""
    return make_seeded_module


@pytest.fixture
def global_model() -> Callable[[nn.Module], GlobalModel]:
    """Makes a global model of a module."""
    return make_global_model


@pytest.fixture
def data() -> Callable[[int], Batch]:
    """Makes a batch of that many random images."""
    return make_data

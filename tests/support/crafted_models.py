"""Crafted models written down from the papers' formulas, without any code of the package, and honest ones beside them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

SIDE = 28
INPUTS = SIDE * SIDE


class InFront(nn.Module):
    """Two dense layers with a gate between them, image to image, then a body."""

    def __init__(self, first: nn.Linear, second: nn.Linear, body: nn.Module, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second, self.body = first, second, body
        self.gate = nn.ReLU() if gate is None else gate

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.gate(self.first(images.flatten(1)))
        output: Tensor = self.body(self.second(hidden).reshape(images.shape))
        return output


def body(generator: torch.Generator, channels: int = 1, classes: int = 4) -> nn.Module:
    """A small honest convolutional classifier for 28x28."""
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        return nn.Sequential(
            nn.Conv2d(channels, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 49, classes),
        )


def dense(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def normal_quantiles(count: int, mean: float, std: float) -> Tensor:
    places = torch.linspace(0.001, 0.999, count, dtype=torch.float64)
    return mean + std * math.sqrt(2) * torch.erfinv(2 * places - 1)


def medleak(generator: torch.Generator, units: int = 256, scale: float = 1.0) -> nn.Module:
    """Rows scale/D, biases minus scale times the quantiles of brightness, equal second columns."""
    weight = torch.full((units, INPUTS), scale / INPUTS)
    bias = -scale * normal_quantiles(units, 0.45, 0.15)
    column = torch.randn(INPUTS, 1, generator=generator)
    second = (10 * column / column.norm() / (units * scale)).repeat(1, units)
    return InFront(dense(weight, bias), dense(second, torch.full((INPUTS,), 0.4)), body(generator))


def disguised(generator: torch.Generator, units: int = 256) -> nn.Module:
    """MedLeak's module with units permuted, rows scaled at random and columns of random signs and sizes (rank 1)."""
    plain = medleak(generator, units)
    assert isinstance(plain, InFront)
    order = torch.randperm(units, generator=generator)
    sizes = torch.exp(torch.randn(units, generator=generator))
    columns = torch.randn(units, generator=generator)
    with torch.no_grad():
        plain.first.weight.copy_(plain.first.weight[order] * sizes[:, None])
        plain.first.bias.copy_(plain.first.bias[order] * sizes)
        plain.second.weight.copy_(plain.second.weight[:, order] * columns)
    return plain


def dead(generator: torch.Generator, units: int = 256) -> nn.Module:
    """What MedLeak sends to all others: no unit is on for any image in [0, 1]."""
    plain = medleak(generator, units)
    assert isinstance(plain, InFront)
    with torch.no_grad():
        plain.first.bias.fill_(-2.0)
    return plain


def robbing_the_fed(generator: torch.Generator, units: int = 128) -> nn.Module:
    """A random linear query with mean 0 and deviation 1/sqrt(N), normal bins, second layer of ones."""
    query = torch.randn(INPUTS, generator=generator)
    query = (query - query.mean()) / query.std() / math.sqrt(INPUTS)
    bias = -normal_quantiles(units, 0.0, 0.3)
    return InFront(
        dense(query.repeat(units, 1), bias),
        dense(torch.ones(INPUTS, units) / units, torch.zeros(INPUTS)),
        body(generator),
    )


def sparse_bins(generator: torch.Generator, units: int = 128) -> nn.Module:
    """Robbing the Fed's sparse variant: rows and biases over the bin's width, hard tanh on [0, 1]."""
    edges = normal_quantiles(units + 1, 0.45, 0.15)
    widths = edges.diff()
    weight = (1 / INPUTS / widths)[:, None].repeat(1, INPUTS)
    return InFront(
        dense(weight, -edges[:-1] / widths),
        dense(torch.ones(INPUTS, units) / units, torch.zeros(INPUTS)),
        body(generator),
        nn.Hardtanh(0.0, 1.0),
    )


def trap_weights(generator: torch.Generator, units: int = 256, mirrored: bool = True) -> nn.Module:
    """Curious Abandon Honesty: half of each row negative, the other half 0.95 times as large, biases 0."""
    rows = []
    for _ in range(units):
        order = torch.randperm(INPUTS, generator=generator)
        sizes = (torch.randn(INPUTS // 2, generator=generator) * 0.5).abs()
        others = sizes if mirrored else (torch.randn(INPUTS // 2, generator=generator) * 0.5).abs()
        row = torch.empty(INPUTS)
        row[order[: INPUTS // 2]], row[order[INPUTS // 2 :]] = -sizes, 0.95 * others
        rows.append(row)
    return nn.Sequential(
        nn.Flatten(), dense(torch.stack(rows), torch.zeros(units)), nn.ReLU(), _linear(generator, units, 4)
    )


def loki(generator: torch.Generator, units: int = 128, clients: int = 4) -> nn.Module:
    """Kernels of one client copy the image times 500, all others are zero; bins behind them, then a layer of 1000s."""
    kernels = torch.zeros(clients, 1, 3, 3)
    kernels[1, 0, 1, 1] = 500.0
    first = nn.Conv2d(1, clients, 3, padding=1)
    edges = normal_quantiles(units + 1, 0.45, 0.15)
    widths = edges.diff()
    with torch.no_grad():
        first.weight.copy_(kernels)
        assert first.bias is not None
        first.bias.zero_()
    weight = (1 / (500 * INPUTS) / widths)[:, None].repeat(1, clients * INPUTS)
    return nn.Sequential(
        first,
        nn.Flatten(),
        dense(weight, -edges[:-1] / widths),
        nn.Hardtanh(0.0, 1.0),
        dense(torch.full((INPUTS, units), 1000.0), torch.zeros(INPUTS)),
        nn.Unflatten(1, (1, SIDE, SIDE)),
        body(generator),
    )


def class_fishing(generator: torch.Generator) -> nn.Module:
    """Last layer zero but for one class at 0.5; biases of all others 1000."""
    net = body(generator)
    head = net[-1]  # type: ignore[index]
    with torch.no_grad():
        head.weight.zero_()
        head.weight[2] = 0.5
        head.bias.fill_(1000.0)
        head.bias[2] = 0.0
    return net


def feature_fishing(generator: torch.Generator) -> nn.Module:
    """Last layer zero but for one feature of one class at 300; that class's bias is a cut of the feature."""
    net = body(generator)
    head = net[-1]  # type: ignore[index]
    with torch.no_grad():
        head.weight.zero_()
        head.weight[2, 5] = 300.0
        head.bias.fill_(1000.0)
        head.bias[2] = -0.1 * 300.0
    return net


def scale_mia(generator: torch.Generator, units: int = 256) -> nn.Module:
    """Bins on the mean of the latent features of honest convolutions, second layer 1/K, no layer added."""
    features = 32 * 49
    honest = body(generator)
    weight = torch.full((units, features), 1 / features)
    with torch.no_grad():
        latent = honest[:-1](torch.rand(64, 1, SIDE, SIDE, generator=generator))  # type: ignore[index]
    means = latent.mean(dim=1)
    bias = -normal_quantiles(units, float(means.mean()), 20 * float(means.std()))
    return nn.Sequential(
        *list(honest.children())[:-1],
        dense(weight, bias),
        nn.ReLU(),
        dense(torch.full((64, units), 1 / units), torch.full((64,), 1 / 64)),
        nn.ReLU(),
        _linear(generator, 64, 4),
    )


def _linear(generator: torch.Generator, inputs: int, outputs: int) -> nn.Linear:
    bound = inputs**-0.5
    weight = (2 * torch.rand(outputs, inputs, generator=generator) - 1) * bound
    return dense(weight, (2 * torch.rand(outputs, generator=generator) - 1) * bound)


def mlp(generator: torch.Generator, units: int = 256, classes: int = 4) -> nn.Module:
    """An honest net whose first layer is dense."""
    return nn.Sequential(nn.Flatten(), _linear(generator, INPUTS, units), nn.ReLU(), _linear(generator, units, classes))


CRAFTED: dict[str, Callable[[torch.Generator], nn.Module]] = {
    "medleak": medleak,
    "medleak at scale 1e-6": lambda generator: medleak(generator, scale=1e-6),
    "medleak, permuted, scaled, rank 1": disguised,
    "medleak's dead module": dead,
    "robbing the fed": robbing_the_fed,
    "robbing the fed, sparse": sparse_bins,
    "trap weights": trap_weights,
    "trap weights, independent": lambda generator: trap_weights(generator, mirrored=False),
    "loki": loki,
    "scale-mia": scale_mia,
    "class fishing": class_fishing,
    "feature fishing": feature_fishing,
}
"""Families by name: each gives a model for grey 28x28 and four classes."""

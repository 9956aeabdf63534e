"""A frozen layer behind the trained one: what it mixes is undone, and what it sorts is seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medpfl.core.domain import Batch, GlobalModel
from medpfl.core.tasks import SingleLabel
from medpfl.guards.frozen import frozen_views
from medpfl.guards.self_test import self_test
from medpfl.guards.vetting import vet
from medpfl.models import prepare

SIDE, UNITS, IMAGES = 12, 96, 12


class Mixed(nn.Module):
    """Trained rows, a frozen matrix that mixes their answers, ReLU, a small head."""

    def __init__(self, rows: Tensor, bias: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        mixing = torch.linalg.qr(torch.randn(len(rows), len(rows), generator=generator, dtype=torch.float64)).Q
        self.first, self.frozen = nn.Linear(rows.shape[1], len(rows)), nn.Linear(len(rows), len(rows), bias=False)
        self.head = nn.Linear(len(rows), 4)
        with torch.no_grad():
            self.first.weight.copy_(mixing.T @ rows.double())
            self.first.bias.copy_(mixing.T @ bias.double())
            self.frozen.weight.copy_(mixing)
        self.frozen.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.head(torch.relu(self.frozen(self.first(images.flatten(1)))))
        return output


def pictures() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(IMAGES, 1, SIDE, SIDE, generator=generator) * torch.linspace(0.3, 1, IMAGES)[:, None, None, None]


def built(net: nn.Module) -> GlobalModel:
    return prepare(net, name="net", image_shape=(1, SIDE, SIDE), task=SingleLabel(4))


def brightness_bins() -> nn.Module:
    """Half of the units are bins with equal columns behind them, the others honest."""
    torch.manual_seed(0)
    edges = pictures().flatten(1).mean(dim=1).quantile(torch.linspace(0, 0.99, UNITS // 2)) - 1e-4
    plain = nn.Linear(SIDE * SIDE, UNITS // 2)
    rows = torch.cat([torch.full((UNITS // 2, SIDE * SIDE), 1 / SIDE**2), plain.weight.detach()])
    net = Mixed(rows, torch.cat([-edges, plain.bias.detach()]), torch.Generator().manual_seed(2))
    with torch.no_grad():
        net.head.weight[:, : UNITS // 2] = net.head.weight[:, :1]
    return net


def honest_units() -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Linear(SIDE * SIDE, UNITS)
    return Mixed(plain.weight.detach(), plain.bias.detach(), torch.Generator().manual_seed(2))


def update_of(model: GlobalModel, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    parameters = {name: tensor.requires_grad_() for name, tensor in model.parameters.items()}
    loss = model.task.loss(model.forward(images, parameters=parameters)[0], labels)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def test_images_come_back_through_a_frozen_mixture_of_bins() -> None:
    model, images, labels = built(brightness_bins()), pictures(), torch.arange(IMAGES) % 4
    found = self_test(model, update_of(model, images, labels), Batch(images, labels))
    alone, both = (next(one for one in found.layers if one.layer == path) for path in ("first", "first and frozen"))
    assert both.sees == "image"
    assert int(both.returned.sum()) >= IMAGES - 1  # neighboring bins hold one image each
    assert alone.share < both.share


def test_bins_that_a_frozen_layer_unmixes_are_crafted() -> None:
    vetting = vet(built(brightness_bins()), images=pictures())
    assert vetting.verdict == "crafted"
    assert "bins_at_work" in {result.check for result in vetting.results if result.status == "found"}
    assert any(reason.startswith("frozen: ") for reason in vetting.reasons)


def test_honest_rows_behind_a_frozen_mixture_leak_as_any_dense_first_net() -> None:
    assert vet(built(honest_units()), images=pictures()).verdict == "leaks"


def test_only_weights_that_nobody_trains_are_frozen() -> None:
    batch = Batch(pictures(), torch.arange(IMAGES) % 4)
    assert [view.path for view in frozen_views(built(brightness_bins()), batch)] == ["frozen"]
    net = brightness_bins()
    net.requires_grad_(True)
    assert frozen_views(built(net), batch) == ()

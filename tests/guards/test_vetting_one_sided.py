"""Traps in a net that is dense first anyway, told from honest layers fresh, trained and dying."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medpfl.core.domain import GlobalModel
from medpfl.core.tasks import SingleLabel
from medpfl.guards.vetting import Vetting, vet
from medpfl.guards.vetting.images import drawn_images
from medpfl.models import prepare

SIDE, UNITS = 24, 256
CHECKS = {"one_sided_rows", "one_sided_units"}


def net(seed: int, weight: Tensor | None = None, bias: Tensor | None = None) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, UNITS), nn.ReLU(), nn.Linear(UNITS, 3))
    if weight is not None and bias is not None:
        module.load_state_dict({**module.state_dict(), "1.weight": weight, "1.bias": bias})
    return module


def built(module: nn.Module) -> GlobalModel:
    return prepare(module, name="net", image_shape=(1, SIDE, SIDE), task=SingleLabel(3))


def found(vetting: Vetting) -> set[str]:
    return {result.check for result in vetting.results if result.status == "found"} & CHECKS


def traps(seed: int, factor: float) -> Tensor:
    """Rows of independent random signs, positive entries `factor` times as large (Boenisch et al.)."""
    rows = 0.1 * torch.randn(UNITS, SIDE * SIDE, generator=torch.Generator().manual_seed(seed))
    return torch.where(rows > 0, factor * rows, rows)


@pytest.mark.parametrize("seed", range(4))
def test_traps_by_smaller_positive_weights_are_found_in_rows_and_at_work(seed: int) -> None:
    vetting = vet(built(net(seed, traps(seed, 0.8), torch.zeros(UNITS))))
    assert (vetting.verdict, found(vetting)) == ("crafted", CHECKS)


@pytest.mark.parametrize("seed", range(4))
def test_traps_by_thresholds_are_found_at_work(seed: int) -> None:
    images, rows = drawn_images((1, SIDE, SIDE), 16).flatten(1), traps(seed, 1.0)
    highest = (images @ rows.T).sort(dim=0).values[-2]
    vetting = vet(built(net(seed, rows, -highest)))
    assert vetting.verdict == "crafted"
    assert "one_sided_units" in found(vetting)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [0, 30])
@pytest.mark.parametrize("rate", [0.001, 0.02])
def test_honest_nets_are_not_even_where_most_units_die(seed: int, steps: int, rate: float) -> None:
    module, images = net(seed), drawn_images((1, SIDE, SIDE), 64)
    labels = torch.arange(64) % 3
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert not found(vet(built(module)))

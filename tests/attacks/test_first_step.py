"""Adam undone, against torch.optim's own steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from medpfl.attacks.first_step import adam_gradient
from medpfl.attacks.updates import gradient_view
from medpfl.core.domain import Batch, Broadcast, GlobalModel, Observation, Recipe
from medpfl.core.tasks import SingleLabel
from medpfl.federation import SecureSum, run_round
from medpfl.federation.client import client_step
from medpfl.models import build_model


def gradients(count: int = 2000, decades: float = 3) -> Tensor:
    """Random signs, sizes spread over so many decades to both sides of 1e-8."""
    generator = torch.Generator().manual_seed(0)
    exponents = (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1) * decades - 8
    return torch.randn(count, generator=generator, dtype=torch.float64).sign() * 10**exponents


def trained(gradient: Tensor, start: Tensor, steps: int, **settings: Any) -> Tensor:
    """Parameters after torch.optim's steps, of which only the first has a gradient."""
    parameter = start.clone().requires_grad_()
    kind = torch.optim.AdamW if settings.pop("optimizer") == "adamw" else torch.optim.Adam
    optimizer = kind([parameter], **settings)
    for step in range(steps):
        parameter.grad = gradient.to(start) if step == 0 else torch.zeros_like(start)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("settings", [{"optimizer": "adam"}, {"optimizer": "adamw", "weight_decay": 0.1}], ids=str)
def test_the_first_steps_gradient_comes_back_although_adam_kept_moving(settings: dict[str, Any], steps: int) -> None:
    gradient, start = gradients(), 1e-3 * torch.randn(2000, dtype=torch.float64)
    after = trained(gradient, start, steps, lr=1e-3, betas=(0.8, 0.95), **settings)
    recipe = Recipe(update="delta", learning_rate=1e-3, betas=(0.8, 0.95), precision="float64", **settings)
    found, lost = adam_gradient(after - start, start, recipe, steps)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-16)
    assert not bool(lost.any())


def test_an_l2_penalty_is_taken_off_again() -> None:
    gradient, start = gradients(decades=1), 0.1 * torch.randn(2000, dtype=torch.float64)
    after = trained(gradient, start, 1, optimizer="adam", lr=1e-3, weight_decay=1e-6)
    recipe = Recipe(update="delta", optimizer="adam", learning_rate=1e-3, weight_decay=1e-6, precision="float64")
    torch.testing.assert_close(adam_gradient(after - start, start, recipe)[0], gradient, rtol=1e-4, atol=1e-15)


def test_what_float32_hides_is_called_lost_and_all_else_is_right() -> None:
    """Sizes far above epsilon move a float32 parameter by the whole learning rate, whatever they are."""
    gradient, start = gradients(decades=8), torch.full((2000,), 1e-2)
    after = trained(gradient, start, 1, optimizer="adam", lr=1e-3)
    recipe = Recipe(update="delta", optimizer="adam", learning_rate=1e-3)
    found, lost = adam_gradient(after.double() - start.double(), start, recipe)
    large = gradient.abs() > 1e-3
    assert bool(lost[large].all())
    assert bool(torch.isfinite(found).all())
    middle = (gradient.abs() > 1e-9) & ~lost
    assert int(middle.sum()) > 300
    assert float((found[middle] / gradient[middle] - 1).abs().max()) < 0.05
    assert torch.equal(found[large].sign(), gradient[large].sign())


@pytest.fixture
def model() -> GlobalModel:
    generator = torch.Generator().manual_seed(0)
    return build_model("lenet_idlg", image_shape=(1, 16, 16), task=SingleLabel(3), generator=generator)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw", "weight_decay": 0.1}], ids=str)
def test_the_view_of_one_adam_step_is_the_clients_gradient(settings: dict[str, Any], model: GlobalModel) -> None:
    batch = Batch(torch.rand((2, 1, 16, 16), generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2]))
    recipe = Recipe(
        **{"update": "weights", "optimizer": "adam", "learning_rate": 0.1, "batch_size": 2, "epsilon": 1e-3, **settings}
    )
    update, _ = client_step(model, batch, recipe)
    view = gradient_view(Observation(model, update, recipe, "honest_server"))
    expected, _ = client_step(model, batch, Recipe(batch_size=2))
    assert view.exact
    for name, tensor in expected.trainable.items():
        torch.testing.assert_close(view.tensors[name].float(), tensor, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("decay", [{}, {"optimizer": "adamw", "weight_decay": 0.1}, {"weight_decay": 1e-4}], ids=str)
def test_behind_an_aggregate_the_only_client_with_gradients_is_told_from_the_others(
    decay: dict[str, Any], model: GlobalModel
) -> None:
    """The others' images are black and their first layer has no bias, so its weights get no gradient."""
    name = next(iter(model.parameters))
    images = torch.rand((2, 1, 16, 16), generator=torch.Generator().manual_seed(1))
    held = [Batch(images, torch.tensor([0, 2])), *[Batch(torch.zeros_like(images), torch.tensor([1, 1]))] * 2]
    recipe = Recipe(
        **{"update": "weights", "optimizer": "adam", "learning_rate": 0.1, "batch_size": 2, "epsilon": 1e-3, **decay}
    )
    broadcast, channel = Broadcast((model,)), SecureSum(clients=3)
    clients = [(batch, torch.Generator()) for batch in held]
    update = run_round(broadcast, clients, recipe, channel=channel, generator=torch.Generator())
    observation = Observation(model, update, recipe, "malicious_server", clients=3, broadcast=broadcast)
    expected, _ = client_step(model, held[0], Recipe(batch_size=2))
    found = gradient_view(observation, (name,), alone=True).tensors[name]
    torch.testing.assert_close(found.float(), expected.trainable[name], rtol=1e-3, atol=1e-6)
    assert not gradient_view(observation).exact

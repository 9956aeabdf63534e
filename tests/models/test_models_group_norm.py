"""Group norm in place of batch norm, beside Opacus's fixer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medpfl.core.domain import Batch, GlobalModel
from medpfl.core.recipes import Recipe
from medpfl.core.tasks import SingleLabel
from medpfl.federation.client import client_step
from medpfl.models import build_model, prepare, validate
from medpfl.models.group_norm import with_group_norm


def normalized(unknown: bool = True) -> nn.Sequential:
    """unknown: with a layer under two names and one without weights, which Opacus's fixer leaves as they are."""
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(12)
    layers = (
        nn.Conv2d(3, 12, 3),
        shared,
        nn.ReLU(),
        nn.Conv2d(12, 12, 3),
        nn.BatchNorm2d(12, affine=not unknown),
        nn.ReLU(),
    )
    module = nn.Sequential(
        *layers, nn.Sequential(shared if unknown else nn.Identity()), nn.Flatten(), nn.Linear(12 * 64, 5)
    )
    with torch.no_grad():
        shared.weight.uniform_(0.5, 1.5)
        shared.bias.uniform_(-0.5, 0.5)
    return module


def prepared(module: nn.Module) -> GlobalModel:
    return prepare(module, name="small", image_shape=(3, 12, 12), task=SingleLabel(5))


def test_it_computes_what_the_model_of_opacus_fixer_computes() -> None:
    validators = pytest.importorskip("opacus.validators")
    module = normalized(unknown=False)
    fixed = validators.ModuleValidator.fix(module)
    assert not validators.ModuleValidator.validate(fixed)
    model = with_group_norm(prepared(module))
    missing = fixed.load_state_dict(dict(model.parameters), strict=False)
    assert not missing.unexpected_keys
    images = torch.rand((2, 3, 12, 12), generator=torch.Generator().manual_seed(0))
    for mode in ("train", "eval"):
        output, buffers = model.forward(images, batch_norm=mode)
        torch.testing.assert_close(output, fixed(images), rtol=1e-5, atol=1e-6)
        assert not buffers


def test_weights_stay_and_statistics_go() -> None:
    before = prepared(normalized())
    after = with_group_norm(before)
    assert list(after.parameters) == list(before.parameters)
    assert all(torch.equal(after.parameters[name], tensor) for name, tensor in before.parameters.items())
    assert before.buffers
    assert not after.buffers
    assert not after.counters
    assert with_group_norm(after) is after


def test_images_no_longer_look_at_each_other() -> None:
    model = with_group_norm(prepared(normalized()))
    images = torch.rand((3, 3, 12, 12), generator=torch.Generator().manual_seed(0))
    together, _ = model.forward(images, batch_norm="train")
    for place in range(3):
        alone, _ = model.forward(images[place : place + 1], batch_norm="train")
        torch.testing.assert_close(together[place], alone[0], rtol=1e-5, atol=1e-6)


def test_a_resnet_can_be_trained_and_attacked_with_it() -> None:
    model = build_model(
        "resnet18_cifar", image_shape=(1, 16, 16), task=SingleLabel(2), generator=torch.Generator().manual_seed(0)
    )
    fixed = with_group_norm(model)
    recipe = Recipe(batch_size=2, batch_norm="train")
    assert not [finding for finding in validate(fixed, recipe) if finding.severity == "refusal"]
    batch = Batch(torch.rand((2, 1, 16, 16), generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1]))
    sent, _ = client_step(fixed, batch, recipe)
    assert not sent.buffers
    assert all(bool(torch.isfinite(tensor).all()) for tensor in sent.trainable.values())

"""Fishing against the gradient of the one image that it isolates, computed with nothing but autograd (for scoring only)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from crafted_rounds import SGD, attacked, lenet
from torch import Tensor, nn

from medpfl.attacks.crafted import ServerView
from medpfl.attacks.fishing import Fishing
from medpfl.attacks.isolation import isolated, last_of, likeliest_alone, pulled
from medpfl.core.domain import Failure, GlobalModel, Observation, Recipe
from medpfl.core.errors import AttackFailure
from medpfl.core.tasks import MultiLabel, SingleLabel
from medpfl.data.dataset import Dataset
from medpfl.federation import Plain, SecureSum
from medpfl.models import build_model, prepare

QUICK: dict[str, Any] = {"iterations": 1, "restarts": 1}


@pytest.fixture
def shapes(films: Dataset, blobs: Callable[..., Tensor]) -> Dataset:
    """Drawn blobs of four classes."""
    targets = torch.randint(4, (600,), generator=torch.Generator().manual_seed(0))
    return replace(films, images=blobs(600, (1, 12, 12)), targets=targets, task=SingleLabel(4), masks=None)


@pytest.fixture
def net(sigmoid_lenet: Callable[..., nn.Module], make_model: Any) -> GlobalModel:
    """A smooth net for them."""
    model: GlobalModel = make_model(sigmoid_lenet(classes=4, width=8), (1, 12, 12), classes=4)
    return model


def gradient_in_front(model: GlobalModel, image: Tensor, label: int) -> Tensor:
    """What one image alone would send of all layers but the last, flattened, float64."""
    model = model.to(torch.float64)
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in model.parameters.items()}
    output = torch.func.functional_call(model.module, parameters, (image[None].double(),))
    loss = torch.nn.functional.cross_entropy(output, torch.tensor([label]))
    found = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    return torch.cat([found[name].flatten() for name in in_front(model)])


def in_front(model: GlobalModel) -> list[str]:
    layer = last_of(model)
    return [name for name in model.parameters if name not in {layer.weight, layer.bias}]


def shown(observation: Observation, label: int, whole: bool = True) -> Tensor:
    """The gradient that the attack isolates, of the same layers."""
    found = isolated(observation, label, whole).update.trainable
    return torch.cat([found[name].double().flatten() for name in in_front(observation.model)])


def with_one(data: Dataset, label: int, others: int, seed: int = 0) -> Tensor:
    """Places of one image of a class and some of other classes."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    same = data.targets[order] == label
    return torch.cat([order[same][:1], order[~same][:others]])


def error(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize("kind", ["gradient", "delta", "weights"])
def test_one_image_of_a_class_has_its_own_gradient_isolated(kind: Any, shapes: Dataset, net: GlobalModel) -> None:
    recipe = replace(SGD, update=kind)
    found = attacked(Fishing(label=2, **QUICK), shapes, 16, recipe=recipe, model=net, places=with_one(shapes, 2, 15))
    sent = found.observation.model
    true = gradient_in_front(sent, found.private[0], 2)
    mine = shown(found.observation, 2)
    assert float(torch.nn.functional.cosine_similarity(mine, true, dim=0)) > 0.99999
    assert error(mine, true) < 2e-3
    assert min(error(mine, gradient_in_front(sent, other, 2)) for other in found.private[1:]) > 0.01
    assert list(sent.parameters) == list(net.parameters)
    assert len(found.result.images) == 1
    assert found.result.labels is not None
    assert found.result.labels.tolist() == [2]


def test_the_isolated_gradient_gives_the_image(shapes: Dataset, net: GlobalModel) -> None:
    attack = Fishing(label=1, search="dlg")
    found = attacked(attack, shapes, 16, model=net, places=with_one(shapes, 1, 15))
    assert found.recovered == 1
    square = (found.result.images.double() - found.private[0].double()).square().mean()
    assert float(square) < 10**-3.5


def test_how_many_images_of_the_class_there_are_stands_in_the_bias(shapes: Dataset, net: GlobalModel) -> None:
    """Exactly one of N with probability N p (1 - p)^(N - 1); otherwise the attack says how many, and returns none."""
    for seed in range(12):
        found = attacked(Fishing(label=3, **QUICK), shapes, 6, model=net, seed=seed)
        places = [int((shapes.images == image).flatten(1).all(dim=1).nonzero()[0]) for image in found.private]
        count = int((shapes.targets[places] == 3).sum())
        assert pulled(found.observation, 3) == pytest.approx(count, abs=0.01)
        assert len(found.result.images) == (count == 1)
        if count != 1:
            assert ("no image of class 3" if count == 0 else f"about {count} images") in found.result.stop_reason


def test_separate_models_keep_the_other_clients_out_of_an_aggregate(shapes: Dataset, net: GlobalModel) -> None:
    held = with_one(shapes, 0, 7)
    others = torch.tensor([place for place in range(100) if place not in held.tolist()])[:16]
    places, channel = torch.cat([held, others]), SecureSum(clients=3)
    attack = Fishing(label=0, mode="separate", **QUICK)
    assert attack.needs() == {"parameters", "inconsistent_models"}
    found = attacked(attack, shapes, 8, channel=channel, model=net, places=places)
    true = gradient_in_front(found.observation.model, found.private[0], 0)
    assert error(shown(found.observation, 0, whole=False), true) < 1e-2
    assert len(found.result.images) == 1
    joint = attacked(Fishing(label=0, **QUICK), shapes, 8, channel=channel, model=net, places=places)
    assert "sent their gradients mixed" in joint.result.stop_reason


@pytest.mark.parametrize("features", ["one", "all"])
def test_feature_fishing_isolates_one_image_of_a_class_about_as_often_as_it_should(
    features: Any, shapes: Dataset, net: GlobalModel
) -> None:
    """A cut at the quantile 1 / N leaves one image below it with probability (1 - 1/N)^(N - 1), 0.39 for N = 8."""
    data, alone = replace(shapes, targets=torch.full_like(shapes.targets, 2)), 0
    for seed in range(24):
        attack = Fishing(by="feature", features=features, sharpness=1e4, **QUICK)
        found = attacked(attack, data, 8, recipe=Recipe(update="gradient"), model=net, seed=seed)
        count = pulled(found.observation, 2)
        if count == pytest.approx(1, abs=1e-3):
            alone += 1
            mine = shown(found.observation, 2)
            errors = [error(mine, gradient_in_front(found.observation.model, image, 2)) for image in found.private]
            assert min(errors) < 1e-2
    assert 0.39 * 24 - 6 <= alone <= 0.39 * 24 + 6


def test_the_class_is_the_one_most_probably_alone() -> None:
    targets = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    assert likeliest_alone(targets, 4, 1) == 0
    assert likeliest_alone(targets, 4, 5) == 1
    assert likeliest_alone(targets, 4, 12) == 2


def test_what_it_cannot_do_is_refused_with_the_reason(films: Dataset) -> None:
    model, attack = lenet(films, 0), Fishing()
    assert attack.why_not(model, SGD, "weights", 8) is None
    assert attack.needs() == {"parameters"}
    assert attack.requires() == {"auxiliary"}
    assert Fishing(label=1).requires() == frozenset()
    assert "local steps" in (attack.why_not(model, replace(SGD, local_steps=2), "weights", 8) or "")
    assert "class" in (Fishing(label=7).why_not(model, SGD, "weights", 8) or "")
    several = replace(model, task=MultiLabel(3))
    assert "softmax" in (attack.why_not(several, SGD, "weights", 8) or "")
    generator = torch.Generator().manual_seed(0)
    normed = build_model("resnet18_cifar", image_shape=(1, 28, 28), task=films.task, generator=generator)
    assert "batch norm" in (attack.why_not(normed, replace(SGD, batch_norm="train"), "weights", 8) or "")
    assert attack.why_not(normed, SGD, "weights", 8) is None
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 3, bias=False))
    bare = prepare(module, name="bare", image_shape=(1, 28, 28), task=SingleLabel(3))
    assert "no bias" in (attack.why_not(bare, SGD, "weights", 8) or "")
    view = ServerView(model, SGD, "weights", Plain(), 8, "malicious_server", frozenset())
    with pytest.raises(AttackFailure, match="auxiliary"):
        attack.prepare(view, torch.Generator())
    assert Fishing(label=1).prepare(view, torch.Generator()).secret["label"] == 1


def test_updates_of_other_models_and_broken_ones(shapes: Dataset, net: GlobalModel) -> None:
    seen = attacked(Fishing(label=2, **QUICK), shapes, 4, model=net, places=with_one(shapes, 2, 3)).observation
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in seen.update.trainable.items()}
    strange = [replace(seen, broadcast=None), replace(seen, update=replace(seen.update, trainable=broken))]
    other, failed = Fishing(label=2).reconstruct(strange, [torch.Generator()] * 2)
    assert isinstance(other, Failure)
    assert isinstance(failed, Failure)
    assert "finite" in failed.reason

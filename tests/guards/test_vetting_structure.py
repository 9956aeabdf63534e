"""Vetting from tensors alone: crafted models by the papers' formulas, honest ones, and bad files."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from crafted_models import CRAFTED, dead, disguised, medleak, mlp
from torch import nn

from medpfl.core.errors import MissingExtra, ModelError
from medpfl.guards.vetting import CHECKS, Vetting, vet
from medpfl.models import MODELS


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.state_dict())


def found(vetting: Vetting) -> set[str]:
    return {result.check for result in vetting.results if result.status == "found"}


@pytest.mark.parametrize("family", CRAFTED)
@pytest.mark.parametrize("seed", [0, 1])
def test_crafted_tensors_are_found(family: str, seed: int) -> None:
    vetting = vet(tensors(CRAFTED[family](torch.Generator().manual_seed(seed))))
    assert vetting.verdict == "crafted"
    assert vetting.reasons
    assert not vetting.passed
    assert not vetting.behavior_checked


@pytest.mark.parametrize("name", MODELS.names())
@pytest.mark.parametrize(("shape", "classes"), [((1, 32, 32), 2), ((3, 32, 32), 20)])
def test_no_model_of_the_zoo_raises_an_alarm(name: str, shape: tuple[int, ...], classes: int) -> None:
    if name == "vit_b16" and classes == 2:
        pytest.skip("86 million entries: once is enough")
    for seed in range(1 if name == "vit_b16" else 3):
        try:
            module = MODELS[name].item(shape, classes, torch.Generator().manual_seed(seed))
        except MissingExtra:
            pytest.skip("needs MONAI")
        vetting = vet(tensors(module))
        assert vetting.passed, vetting.reasons


def test_an_honest_dense_first_layer_leaks_and_is_not_called_crafted() -> None:
    vetting = vet(tensors(mlp(torch.Generator().manual_seed(0))))
    assert vetting.verdict == "leaks"
    assert found(vetting) == {"dense_first"}


def test_scores_do_not_depend_on_the_order_and_scale_of_units() -> None:
    plain = vet(tensors(medleak(torch.Generator().manual_seed(3))))
    other = vet(tensors(disguised(torch.Generator().manual_seed(3))))
    for one, another in zip(plain.results, other.results, strict=True):
        if one.status != "not checked":
            assert another.score == pytest.approx(one.score, rel=1e-3, abs=1e-6), one.check


def test_a_model_that_is_its_own_reference_differs_in_nothing() -> None:
    own = tensors(MODELS["cnn_fedavg"].item((1, 28, 28), 4, torch.Generator().manual_seed(0)))
    compared = [result for result in vet(own, own).results if result.about == "reference"]
    compared = [result for result in compared if result.check != "agreed_model"]
    assert len(compared) + 1 == sum(entry.item.about == "reference" for entry in CHECKS)
    assert all(result.score == pytest.approx(0.0, abs=1e-6) for result in compared)


def test_a_model_after_some_training_is_like_its_reference_and_one_with_other_weights_is_not() -> None:
    before = MODELS["cnn_fedavg"].item((1, 28, 28), 4, torch.Generator().manual_seed(0))
    start = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    images, labels = torch.rand(64, 1, 28, 28), torch.arange(64) % 4
    optimizer = torch.optim.SGD(before.parameters(), lr=0.05, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(before(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert vet(tensors(before), start).passed
    drawn_anew = tensors(MODELS["cnn_fedavg"].item((1, 28, 28), 4, torch.Generator().manual_seed(1)))
    assert "replaced_tensor" in found(vet(drawn_anew, start))


def test_a_last_layer_that_starts_at_zero_is_not_called_replaced() -> None:
    before = tensors(MODELS["cnn_fedavg"].item((1, 28, 28), 4, torch.Generator().manual_seed(0)))
    small = {**before, "fc.weight": 1e-3 * before["fc.weight"]}
    after = {**before, "fc.weight": torch.randn_like(before["fc.weight"])}
    assert vet(after, small).passed
    body = next(name for name in before if before[name].ndim == 2 and name != "fc.weight")
    assert "replaced_tensor" in found(vet({**before, body: torch.randn_like(before[body])}, before))


def test_an_added_layer_is_named() -> None:
    module = medleak(torch.Generator().manual_seed(0))
    agreed = {f"body.{name}": tensor for name, tensor in module.body.state_dict().items()}  # type: ignore[union-attr]
    vetting = vet(tensors(module), agreed)
    assert "other_tensors" in found(vetting)
    assert any("'first.weight' is new" in reason for reason in vetting.reasons)


def test_without_a_reference_nothing_is_compared_and_that_is_said() -> None:
    vetting = vet(tensors(mlp(torch.Generator().manual_seed(0))))
    compared = [result for result in vetting.results if result.about == "reference"]
    assert {result.status for result in compared} == {"not checked"}
    assert all(math.isnan(result.score) for result in compared)


def test_what_is_not_covered_is_said() -> None:
    text = " ".join(vet(tensors(dead(torch.Generator().manual_seed(0)))).not_covered)
    for word in ("training code", "recipe", "aggregation", "digests"):
        assert word in text


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "has no weights"),
        ({"steps": torch.tensor(3)}, "has no weights"),
        ({"fc.weight": torch.tensor([[1.0, float("nan")]])}, "'fc.weight' holds numbers that are not finite"),
        ({"fc.weight": torch.zeros(1).expand(2**20, 2**20)}, "entries, for which this machine's"),
    ],
)
def test_unusable_tensors_are_refused_in_one_sentence(tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        vet(tensors)


FILLS: dict[str, Callable[[tuple[int, ...]], torch.Tensor]] = {
    "zeros": torch.zeros,
    "ones": torch.ones,
    "large": lambda shape: (1e38 * torch.randn(shape)).clamp(-3e38, 3e38),
    "tiny": lambda shape: 1e-40 * torch.randn(shape),
    "half": lambda shape: torch.randn(shape).half(),
    "sparse": lambda shape: (torch.randn(shape) > 2).float(),
}


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (20, 17), (300, 40), (16, 1, 3, 3), (17, 16, 3, 3, 3), (0, 4)])
def test_odd_tensors_get_a_verdict_or_one_sentence(fill: str, shape: tuple[int, ...]) -> None:
    odd = {"a.weight": FILLS[fill](shape), "a.bias": FILLS[fill](shape[:1])}
    plain = {"b.weight": torch.randn(16, 16), "b.bias": torch.randn(16)}
    for tensors in ({**odd, **plain}, {**plain, **odd}):
        vetting = vet(tensors, reference={**plain, "a.weight": torch.randn(shape)})
        assert all(result.status == "not checked" or math.isfinite(result.score) for result in vetting.results)

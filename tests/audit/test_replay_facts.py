"""What a diagnosis reads of a recorded update without any truth: each sentence beside what was really done to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medpfl.audit.replay import prepare_replay
from medpfl.audit.replay.diagnosis.facts import measured
from medpfl.audit.replay.diagnosis.subject import Fact
from medpfl.audit.replay.diagnosis.subjects import subject_of
from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.tasks import SingleLabel
from medpfl.federation.client import client_step
from medpfl.federation.recording import MemoryStorage, Recorder, read_recording
from medpfl.models import build_model

Sent = Mapping[str, Tensor]


def model(name: str = "lenet_dlg", classes: int = 4) -> GlobalModel:
    return build_model(
        name,
        image_shape=(1, 16, 16),
        task=SingleLabel(classes),
        generator=torch.Generator().manual_seed(0),
        search_path=(Path.cwd(),),
    )


def batch(count: int) -> Batch:
    stream = torch.Generator().manual_seed(1)
    return Batch(torch.rand(count, 1, 16, 16, generator=stream), torch.arange(count) % 4)


def facts(
    net: GlobalModel,
    sent: Sent,
    *,
    recipe: Mapping[str, Any] | None = None,
    examples: int = 1,
    kind: str = "weights",
    others: Mapping[str, Sent] | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Fact]:
    """Facts about what client `a` sent, by name."""
    storage = MemoryStorage()
    with Recorder(storage) as recorder:
        recorder.sent(1, {**net.parameters, **net.buffers, **net.counters})
        for client, tensors in {"a": sent, **(others or {})}.items():
            recorder.received(1, client, tensors, kind=kind, examples=examples, config=dict(config or {}))  # type: ignore[arg-type]
    settings = prepare_replay(
        "made",
        read_recording(storage),
        net.name,
        recipe=recipe,
        size=16,
        channels=1,
        classes=net.task.classes,
        search_path=(Path.cwd(),),
    )
    return {fact.name: fact for fact in measured(subject_of(settings, settings.updates[0]))}


def trained(net: GlobalModel, count: int = 1, **recipe: Any) -> dict[str, Tensor]:
    """The whole state that a client sends after training."""
    update, _ = client_step(net, batch(count), Recipe(update="weights", learning_rate=0.1, **recipe))
    return {**update.trainable, **update.buffers, **update.counters}


def with_change(net: GlobalModel, sent: Sent, what: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: net.parameters[name] + what(tensor - net.parameters[name]) for name, tensor in sent.items()}


RECIPE = {"learning_rate": 0.1}


def test_a_clean_update_of_one_image_shows_an_open_way() -> None:
    net = model()
    found = facts(net, trained(net), recipe=RECIPE)
    assert "comes from one image" in found["images"].text
    assert "one gradient step" in found["recipe"].text
    assert found["noise"].text.startswith("No noise was found")
    assert "1 image of class 0" in found["labels"].text
    assert not {"grid", "bound", "zeros", "precision", "equal_steps", "rank"} & set(found)
    assert not [fact.text for fact in found.values() if fact.standing == "hinders"]
    gradient = torch.func.grad(lambda p: torch.nn.functional.cross_entropy(
        torch.func.functional_call(net.module, {**net.parameters, **p}, batch(1).images), batch(1).targets
    ))(dict(net.parameters))  # fmt: skip
    own = float(torch.cat([one.flatten() for one in gradient.values()]).norm())
    assert f"The mean gradient has norm {own:.3g};" in found["learnt"].text


@pytest.mark.parametrize(("laplace", "kurtosis"), [(False, 0.0), (True, 3.0)])
def test_noise_is_measured_without_the_images(laplace: bool, kurtosis: float) -> None:
    net = model()
    torch.manual_seed(0)
    draw = torch.distributions.Laplace(0.0, 0.01 / 2**0.5) if laplace else torch.distributions.Normal(0.0, 0.01)
    found = facts(
        net, with_change(net, trained(net, 2, batch_size=2), lambda one: one + draw.sample(one.shape)), recipe=RECIPE
    )
    assert found["noise"].value == pytest.approx(0.01, rel=0.05)
    assert "something was added" in found["noise"].text
    assert found["noise"].standing == "hinders"
    told = float(found["noise"].text.partition("kurtosis of ")[2].split()[0])
    margin = float(found["noise"].text.partition("± ")[2].split()[0])
    assert abs(told - kurtosis) <= margin


def test_noise_makes_an_inferred_label_doubtful() -> None:
    net = model()
    torch.manual_seed(0)
    found = facts(net, with_change(net, trained(net), lambda one: one + torch.randn_like(one)), recipe=RECIPE)
    assert found["labels"].standing == "hinders"
    assert "noise deviations apart" in found["labels"].text


def test_weight_decay_is_not_taken_for_noise() -> None:
    net = model()
    found = facts(net, trained(net, weight_decay=0.05), recipe=RECIPE)
    assert "weight decay, no noise" in found["noise"].text
    assert "0.50% of the weights" in found["noise"].text  # 0.1 * 0.05


def test_local_steps_leave_no_noise_behind() -> None:
    net = model()
    found = facts(net, trained(net, 8, batch_size=2, local_steps=4), examples=8,
                  recipe={**RECIPE, "batch_size": 2, "local_steps": 4})  # fmt: skip
    assert found["noise"].text.startswith("No noise was found")
    assert "4 local steps" in found["recipe"].text
    assert found["recipe"].standing == "hinders"
    assert "mixes 8 images" in found["images"].text


@pytest.mark.parametrize("bits", [4, 8])
def test_quantization_is_seen_with_its_step(bits: int) -> None:
    net = model()
    update, _ = client_step(net, batch(1), Recipe(update="delta", learning_rate=0.1))
    step = 2 * max(float(one.abs().max()) for one in update.trainable.values()) / (2**bits - 1)
    sent = {name: (one / step).round() * step for name, one in update.trainable.items()}
    found = facts(net, sent, kind="delta", recipe=RECIPE)
    assert f"({step:.3g} apart" in found["grid"].text
    error = sum(float((sent[name] - one).square().sum()) for name, one in update.trainable.items())
    square = sum(float(one.square().sum()) for one in sent.values())
    assert found["grid"].value is not None
    assert 0.3 < found["grid"].value / (error / square) < 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_seen_also_after_it_was_widened(dtype: torch.dtype) -> None:
    net = model()
    sent = trained(net)
    rounded = {name: one.to(dtype).float() for name, one in sent.items()}
    found = facts(net, rounded, recipe=RECIPE)
    assert f"fit into {str(dtype).removeprefix('torch.')}" in found["precision"].text
    error = sum(float((rounded[name] - one).square().sum()) for name, one in sent.items())
    square = sum(float((one - net.parameters[name]).square().sum()) for name, one in rounded.items())
    assert found["precision"].value == pytest.approx(error / square, rel=0.5)


def test_sparsification_is_seen() -> None:
    net = model()
    found = facts(net, with_change(net, trained(net), lambda one: one * (one.abs() >= one.abs().quantile(0.9))))
    assert found["zeros"].value == pytest.approx(0.9, abs=0.02)
    assert found["zeros"].standing == "hinders"


def test_clipping_shows_in_equal_norms() -> None:
    net = model()
    clients = {}
    for client, count in (("a", 1), ("b", 2), ("c", 3)):
        sent = trained(net, count, batch_size=count)
        norm = torch.cat([(one - net.parameters[name]).flatten() for name, one in sent.items()]).norm()
        clients[client] = with_change(net, sent, lambda one, norm=norm: one * float(0.01 / norm))  # type: ignore[misc]
    found = facts(net, clients.pop("a"), others=clients)
    assert "3 of the round's 3 updates have the same norm of 0.01" in found["bound"].text
    natural = facts(net, trained(net), others={"b": trained(net, 2, batch_size=2)})
    assert "bound" not in natural


def test_the_first_step_of_adam_is_seen() -> None:
    net = model()
    found = facts(net, trained(net, optimizer="adam"))
    assert "by the same 0.1" in found["equal_steps"].text


NORMED = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Flatten(), nn.Linear(1024, 4))
"""


def test_batch_norm_in_train_mode_is_seen_against_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "normed_sixteen.py").write_text(NORMED)
    monkeypatch.chdir(tmp_path)
    net = model("normed_sixteen:make")
    sent = trained(net, 4, batch_size=2, local_steps=2, batch_norm="train")
    wrong = facts(net, sent, examples=4, recipe={**RECIPE, "batch_size": 2, "local_steps": 2})
    assert "ran in train mode" in wrong["batch_norm"].text
    assert "counters say 2 batches more" in wrong["batch_norm"].text
    assert "eval mode: it is not this client's" in wrong["batch_norm"].text
    longer = {**RECIPE, "batch_size": 2, "local_steps": 2, "epochs": 3, "batch_norm": "train"}
    assert "the recipe that was given has 6" in facts(net, sent, examples=4, recipe=longer)["batches"].text


def test_a_number_of_images_that_does_not_fit_the_recipe_is_told() -> None:
    net = model()
    found = facts(net, trained(net), examples=7, recipe={**RECIPE, "batch_size": 2, "local_steps": 2})
    assert "trains on 4 images" in found["recipe"].text
    assert "it held 7" in found["recipe"].text


def test_more_directions_than_images_are_told() -> None:
    net = model(classes=10)
    sent = trained(net, 6, batch_size=6)
    assert "rank" not in facts(net, sent, recipe={**RECIPE, "batch_size": 6}, examples=6)
    found = facts(net, sent, recipe=RECIPE, examples=1)
    name = found["rank"].text.split("'")[1]
    change = (sent[name] - net.parameters[name]).double().numpy()
    assert f"changed in {np.linalg.matrix_rank(change, tol=1e-6)} directions" in found["rank"].text
    assert "1 image in 1 pass move it in at most 1" in found["rank"].text


def test_an_aggregate_is_named_as_one() -> None:
    net = model()
    found = facts(net, trained(net, 4, batch_size=4), examples=4, config={"clients": 4})
    assert "mean over 4 clients with 4 images" in found["images"].text


def test_an_update_that_is_not_finite_or_changes_nothing_says_so() -> None:
    net = model()
    broken = facts(net, with_change(net, trained(net), lambda one: one * float("nan")))
    assert "not finite" in broken["size"].text
    assert "Nothing changed" in facts(net, dict(net.parameters))["zeros"].text
    assert "noise" not in broken


def test_a_withheld_recipe_claims_no_gradient_size() -> None:
    net = model()
    found = facts(net, trained(net))
    assert "not given" in found["recipe"].text
    assert "cannot be told" in found["learnt"].text
    assert "if the client trained with SGD" in found["noise"].text

"""Who owns the truth learns whether the client's step gives what was recorded, and what it looks like if it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medpfl.audit.replay import prepare_replay
from medpfl.audit.replay.diagnosis.changes import Owned
from medpfl.audit.replay.diagnosis.owners import owned
from medpfl.audit.replay.diagnosis.subject import Fact
from medpfl.audit.replay.diagnosis.subjects import owned_update, subject_of
from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.tasks import SingleLabel
from medpfl.federation.client import client_step
from medpfl.federation.recording import MemoryStorage, Recorder, read_recording
from medpfl.models import build_model

RATE = {"learning_rate": 0.1}


def model(name: str = "lenet_dlg") -> GlobalModel:
    return build_model(name, image_shape=(1, 16, 16), task=SingleLabel(4), generator=torch.Generator().manual_seed(0))


def batch(count: int) -> Batch:
    stream = torch.Generator().manual_seed(1)
    return Batch(torch.rand(count, 1, 16, 16, generator=stream), torch.arange(count) % 4)


def trained(net: GlobalModel, images: Batch, **recipe: Any) -> dict[str, Tensor]:
    update, _ = client_step(net, images, Recipe(update="weights", **{**RATE, **recipe}))
    return {**update.trainable, **update.buffers, **update.counters}


def told(
    folder: Path,
    net: GlobalModel,
    images: Batch,
    sent: Mapping[str, Tensor],
    recipe: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Fact]:
    np.savez(folder / "a.npz", images=images.images.numpy(), labels=images.targets.numpy())
    storage = MemoryStorage()
    with Recorder(storage) as recorder:
        recorder.sent(1, {**net.parameters, **net.buffers, **net.counters})
        recorder.received(1, "a", sent, kind="weights", examples=len(images), config=dict(config or {}))
    settings = prepare_replay(
        "made", read_recording(storage), net.name, recipe=recipe, truth=folder, size=16, channels=1, classes=4
    )
    subject = subject_of(settings, settings.updates[0])
    found = owned_update(settings, settings.updates[0], subject)
    assert isinstance(found, Owned), found
    return {fact.name: fact for fact in owned(subject, found.groups, found.agreement)}


def changed(net: GlobalModel, sent: Mapping[str, Tensor], what: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {
        name: net.parameters[name] + what(one - net.parameters[name]) if name in net.parameters else one
        for name, one in sent.items()
    }


def test_the_right_recipe_and_images_leave_nothing(tmp_path: Path) -> None:
    net, images = model(), batch(4)
    sent = trained(net, images, batch_size=2, local_steps=2, epochs=2)
    found = told(tmp_path, net, images, sent, {**RATE, "batch_size": 2, "local_steps": 2, "epochs": 2})
    assert "gives the recorded update: cosine 1.00" in found["agreement"].text
    assert "No defense acted" in found["agreement"].text
    assert "residual" not in found
    assert "of the 4 inferred labels are right" in found["true_labels"].text


def test_other_images_than_those_that_were_trained_on_do_not_fit(tmp_path: Path) -> None:
    net, images = model(), batch(1)
    other = Batch(torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(9)), images.targets)
    found = told(tmp_path, net, other, trained(net, images), RATE)
    assert "does not" in found["agreement"].text
    assert found["agreement"].standing == "hinders"


def test_noise_is_what_is_left_with_its_deviation_and_kind(tmp_path: Path) -> None:
    net, images = model(), batch(1)
    torch.manual_seed(0)
    noisy = changed(net, trained(net, images), lambda one: one + 0.01 * torch.randn_like(one))
    found = told(tmp_path, net, images, noisy, RATE)
    assert found["residual"].value == pytest.approx(0.01, rel=0.03)
    assert "alike in all large tensors" in found["residual"].text
    assert abs(float(found["residual"].text.partition("kurtosis of ")[2].split()[0])) < 0.3
    clean = torch.cat([(one - net.parameters[name]).flatten() for name, one in trained(net, images).items()])
    both = torch.cat([(one - net.parameters[name]).flatten() for name, one in noisy.items()])
    cosine = float(clean @ both / clean.norm() / both.norm())
    assert f"cosine {cosine:.3f}" in found["agreement"].text


def test_clipping_is_a_factor_and_nothing_else(tmp_path: Path) -> None:
    net, images = model(), batch(2)
    sent = changed(net, trained(net, images, batch_size=1, local_steps=2), lambda one: 0.25 * one)
    found = told(tmp_path, net, images, sent, {**RATE, "batch_size": 1, "local_steps": 2, "epochs": 1})
    assert "0.25 times the replayed one and nothing else" in found["residual"].text
    assert "recipe_found" not in found


def test_another_learning_rate_of_one_step_is_a_factor_too(tmp_path: Path) -> None:
    net, images = model(), batch(1)
    found = told(tmp_path, net, images, trained(net, images, learning_rate=0.03), RATE)
    assert "another learning rate (0.03)" in found["residual"].text


def test_sparsification_is_told_by_what_is_missing(tmp_path: Path) -> None:
    net, images = model(), batch(1)
    sent = changed(net, trained(net, images), lambda one: one * (one.abs() >= one.abs().quantile(0.8)))
    found = told(tmp_path, net, images, sent, RATE)
    missing = next(fact for fact in found.values() if "came back unchanged" in fact.text)
    assert missing.value == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    ("real", "stated", "words"),
    [
        ({"batch_size": 1, "local_steps": 4, "learning_rate": 0.03}, {"local_steps": 4}, "learning_rate: 0.0"),
        ({"batch_size": 2, "local_steps": 2}, {"batch_size": 4}, "batch_size: 2, local_steps: 2"),
        ({"batch_size": 4, "epochs": 3}, {"batch_size": 4}, "epochs: 3"),
        ({"batch_size": 4, "optimizer": "adam"}, {"batch_size": 4}, "optimizer: adam"),
        ({"batch_size": 4, "optimizer": "adam", "learning_rate": 0.001}, {"batch_size": 4}, "optimizer: adam"),
        ({"batch_size": 4, "epochs": 3, "momentum": 0.9}, {"batch_size": 4, "epochs": 3}, "momentum: 0.9"),
        ({"batch_size": 2, "local_steps": 2, "epochs": 3}, {"batch_size": 4}, "local_steps: 2, epochs: 3"),
        ({"batch_size": 2, "local_steps": 2}, None, "batch_size: 2, local_steps: 2"),
    ],
)
def test_a_wrong_or_missing_recipe_is_found(
    tmp_path: Path, real: dict[str, Any], stated: dict[str, Any] | None, words: str
) -> None:
    net = model()
    images = batch(real.get("batch_size", 1) * real.get("local_steps", 1))
    found = told(tmp_path, net, images, trained(net, images, **real), None if stated is None else {**RATE, **stated})
    assert words in found["recipe_found"].text
    assert ("No recipe was given" in found["recipe_found"].text) is (stated is None)


def test_batch_norm_in_the_other_mode_is_found(tmp_path: Path) -> None:
    net, images = model("resnet18_cifar"), batch(3)
    sent = trained(net, images, batch_size=3, batch_norm="train")
    found = told(tmp_path, net, images, sent, {**RATE, "batch_size": 3})
    assert "batch_norm: train" in found["recipe_found"].text


def test_an_aggregate_is_replayed_client_by_client(tmp_path: Path) -> None:
    net, images = model(), batch(3)
    parts = [trained(net, Batch(images.images[[0]], images.targets[[0]])),
             trained(net, Batch(images.images[1:], images.targets[1:]), local_steps=2)]  # fmt: skip
    mean = {name: (1 * parts[0][name] + 2 * parts[1][name]) / 3 for name in parts[0]}
    config = {"clients": 2, "examples_by_client": [1, 2]}
    found = told(tmp_path, net, images, mean, {**RATE, "batch_size": 2}, config)
    assert "agreement" in found
    one_each = {"clients": 3, "examples_by_client": [1, 1, 1]}
    singles = [trained(net, Batch(images.images[[i]], images.targets[[i]])) for i in range(3)]
    mean = {name: sum(one[name] for one in singles) / 3 for name in singles[0]}  # type: ignore[misc]
    assert "gives the recorded update" in told(tmp_path, net, images, mean, RATE, one_each)["agreement"].text


def test_a_truth_of_another_size_is_told(tmp_path: Path) -> None:
    net, images = model(), batch(2)
    np.savez(tmp_path / "b.npz", images=images.images.numpy(), labels=images.targets.numpy())
    storage = MemoryStorage()
    with Recorder(storage) as recorder:
        recorder.sent(1, dict(net.parameters))
        recorder.received(1, "b", trained(net, images, batch_size=2), kind="weights", examples=5)
    settings = prepare_replay("made", read_recording(storage), net.name, truth=tmp_path, size=16, channels=1, classes=4)
    subject = subject_of(settings, settings.updates[0])
    found = owned_update(settings, settings.updates[0], subject)
    assert isinstance(found, Owned)
    facts = {fact.name: fact.text for fact in owned(subject, found.groups, found.agreement)}
    assert "holds 2 images" in facts["true_images"]
    assert "the update says 5" in facts["true_images"]


def test_labels_that_the_model_does_not_have_are_told(tmp_path: Path) -> None:
    net, images = model(), batch(2)
    np.savez(tmp_path / "a.npz", images=images.images.numpy(), labels=[0, 9])
    storage = MemoryStorage()
    with Recorder(storage) as recorder:
        recorder.sent(1, dict(net.parameters))
        recorder.received(1, "a", trained(net, images, batch_size=2), kind="weights", examples=2)
    settings = prepare_replay("made", read_recording(storage), net.name, truth=tmp_path, size=16, channels=1, classes=4)
    found = owned_update(settings, settings.updates[0], subject_of(settings, settings.updates[0]))
    assert found == "the truth's labels run from 0 to 9, the model has 4 classes"

"""Checkpoints: formats, prefixes, what does not fit, and what must not be loaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medpfl.core.domain import GlobalModel
from medpfl.core.errors import ModelError
from medpfl.core.tasks import SingleLabel
from medpfl.models import (
    Normalization,
    build_model,
    fingerprint,
    imagenet_weights,
    load_checkpoint,
    load_model,
    prepare,
    save_model,
)
from medpfl.models.resnet import ResNet18


def module(seed: int, classes: int = 3) -> nn.Module:
    """Convolution, batch norm, head."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, classes)).train()
        net(torch.rand(4, 1, 8, 8))
    return net.eval()


def model_of(net: nn.Module, classes: int = 3, **options: Any) -> GlobalModel:
    """Its global model."""
    return prepare(net, name="mine", image_shape=(1, 8, 8), task=SingleLabel(classes), **options)


def assert_behaves_like(model: GlobalModel, net: nn.Module) -> None:
    """Same outputs on random images."""
    images = torch.rand((3, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.forward(images)[0], net(images), rtol=1e-5, atol=1e-6)


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Names with a prefix."""
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "model.module.", "_orig_mod."])
@pytest.mark.parametrize("form", ["safetensors", "state_dict", "wrapped", "old"])
def test_checkpoints_load_in_all_usual_forms(tmp_path: Path, form: str, prefix: str) -> None:
    trained = module(1)
    state = prefixed(trained.state_dict(), prefix)
    path = tmp_path / "weights.bin"
    if form == "safetensors":
        save_file(state, path)
    elif form == "wrapped":
        torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form != "old")
    model = load_checkpoint(model_of(module(2)), path)
    assert_behaves_like(model, trained)
    assert int(model.counters["1.num_batches_tracked"]) == 1


def test_normalized_models_load_plain_checkpoints(tmp_path: Path) -> None:
    trained = module(1)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    model = load_checkpoint(
        model_of(module(2), normalize=Normalization(mean=(0.0,), std=(1.0,))), tmp_path / "weights.pt"
    )
    assert_behaves_like(model, trained)


def test_half_precision_checkpoints_load_and_the_first_model_stays(tmp_path: Path) -> None:
    trained = module(1).half()
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    first = model_of(module(2))
    before = fingerprint(first)
    model = load_checkpoint(first, tmp_path / "weights.safetensors")
    assert model.parameters["0.weight"].dtype == torch.float32
    assert fingerprint(first) == before != fingerprint(model)


def test_frozen_and_tied_tensors_are_loaded_too(tmp_path: Path) -> None:
    def net(value: float) -> nn.Module:
        first, second = nn.Linear(64, 64), nn.Linear(64, 64)
        second.weight = first.weight
        nn.init.constant_(first.weight, value)
        nn.init.constant_(first.bias, value)
        first.bias.requires_grad_(False)
        return nn.Sequential(nn.Flatten(), first, nn.Tanh(), second, nn.Linear(64, 3))

    trained = net(0.01)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    assert_behaves_like(load_checkpoint(model_of(net(0.5)), tmp_path / "weights.pt"), trained)
    untied = {**trained.state_dict(), "3.weight": torch.zeros(64, 64)}
    torch.save(untied, tmp_path / "untied.pt")
    with pytest.raises(ModelError, match="ties them"):
        load_checkpoint(model_of(net(0.5)), tmp_path / "untied.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: {**state, "extra": torch.ones(1)}, "'extra' is unknown here"),
        (lambda state: {n: t for n, t in state.items() if n != "0.bias"}, "'0.bias' is missing"),
        (lambda state: {**state, "3.weight": torch.ones(5, 72)}, r"'3.weight' is \(5, 72\) there and \(3, 72\) here"),
        (
            lambda _: {"a": torch.ones(1), "b": torch.ones(1)},
            "0.weight' is missing; 'a' is unknown here; .* and 7 more",
        ),
        (
            lambda state: {**state, "0.bias": torch.tensor([1.0, float("nan")])},
            "'0.bias' holds numbers that are not finite",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_what_does_not_fit_is_named(tmp_path: Path, change: Any, words: str, suffix: str) -> None:
    path = tmp_path / f"weights.{suffix}"
    state = change(module(1).state_dict())
    if suffix == "pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    with pytest.raises(ModelError, match=words) as error:
        load_checkpoint(model_of(module(2)), path)
    assert "\n" not in str(error.value)


class Trap:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, new_format: bool) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"0.weight": Trap(tmp_path / "sprung")}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ModelError, match="contains code"):
        load_checkpoint(model_of(module(2)), path)
    assert not (tmp_path / "sprung").exists()


def test_whole_pickled_modules_are_refused(tmp_path: Path) -> None:
    torch.save(module(1), tmp_path / "model.pt")
    with pytest.raises(ModelError, match="contains code"):
        load_checkpoint(model_of(module(2)), tmp_path / "model.pt")


@pytest.mark.parametrize("form", ["safetensors", "new", "old"])
@pytest.mark.parametrize("kept", [0, 1, 2, 9, 0.1, 0.3, 0.5, 0.9, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, form: str, kept: float) -> None:
    path = tmp_path / "weights.bin"
    if form == "safetensors":
        save_file(module(1).state_dict(), path)
    else:
        torch.save(module(1).state_dict(), path, _use_new_zipfile_serialization=form == "new")
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ModelError, match=r"checkpoint '.*weights\.bin'") as error:
        load_checkpoint(model_of(module(2)), path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}, torch.ones(2)])
def test_files_without_a_state_dict_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ModelError, match="state dict"):
        load_checkpoint(model_of(module(2)), tmp_path / "other.pt")


def test_missing_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(ModelError, match="does not exist or is not a file"):
            load_checkpoint(model_of(module(2)), path)


def test_the_cache_returns_what_was_saved_under_the_same_key_only(tmp_path: Path) -> None:
    trained = model_of(module(1))
    path = tmp_path / "cache" / "trained.safetensors"
    save_model(trained, path, key="abc")
    assert fingerprint(load_model(model_of(module(2)), path, key="abc")) == fingerprint(trained)
    assert [file.name for file in path.parent.iterdir()] == ["trained.safetensors"]
    with pytest.raises(ModelError, match="belongs to abc"):
        load_model(trained, path, key="xyz")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ModelError, match="delete it"):
        load_model(trained, path, key="abc")


def test_fingerprints_see_every_tensor() -> None:
    model = model_of(module(1))
    prints = {fingerprint(model), fingerprint(model_of(module(2)))}
    for group in (model.parameters, model.buffers, model.counters):
        tensor = next(iter(group.values()))
        tensor.view(-1)[0] += 1
        prints.add(fingerprint(model))
    assert len(prints) == 5


@pytest.fixture
def torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResNet18:
    """A stand-in for torchvision whose cache holds a color ResNet18 of 1000 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        published = ResNet18(3, 1000, small_images=False).eval()
    (tmp_path / "checkpoints").mkdir()
    torch.save(published.state_dict(), tmp_path / "checkpoints" / "resnet18-0123.pth")
    models = ModuleType("torchvision.models")
    weights = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url="https://example.org/models/resnet18-0123.pth"))
    models.ResNet18_Weights = weights  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return published


def resnet(channels: int, classes: int, name: str = "resnet18", **options: Any) -> GlobalModel:
    """An untrained ResNet18."""
    generator = torch.Generator().manual_seed(0)
    return build_model(name, image_shape=(channels, 32, 32), task=SingleLabel(classes), generator=generator, **options)


def test_imagenet_weights_fit_a_color_model_of_a_thousand_classes(torchvision: ResNet18) -> None:
    model, notes = imagenet_weights(resnet(3, 1000))
    images = torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.forward(images)[0], torchvision(images), rtol=1e-4, atol=1e-4)
    assert len(notes) == 1
    assert "normalize" in notes[0]


def test_imagenet_weights_on_grey_images_equal_the_color_model_on_three_equal_channels(torchvision: ResNet18) -> None:
    untrained = resnet(1, 4, normalize=Normalization(mean=(0.0,), std=(1.0,)))
    model, notes = imagenet_weights(untrained)
    assert any("4 classes keeps its random initialization" in note for note in notes)
    assert any("sum of ImageNet's kernels" in note for note in notes)
    assert torch.equal(model.parameters["body.fc.weight"], untrained.parameters["body.fc.weight"])
    torchvision.fc = nn.Linear(512, 4)
    torchvision.fc.load_state_dict(
        {"weight": model.parameters["body.fc.weight"], "bias": model.parameters["body.fc.bias"]}
    )
    grey = torch.rand((2, 1, 32, 32), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.forward(grey)[0], torchvision(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_imagenet_weights_that_are_not_there_are_refused(
    torchvision: ResNet18, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="not available for model 'resnet18_cifar'"):
        imagenet_weights(resnet(3, 4, "resnet18_cifar"))
    (tmp_path / "checkpoints" / "resnet18-0123.pth").unlink()
    with pytest.raises(ModelError, match=r"finds no 'resnet18-0123\.pth'"):
        imagenet_weights(resnet(3, 4))
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ModelError, match="install torchvision"):
        imagenet_weights(resnet(3, 4))

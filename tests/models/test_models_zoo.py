"""The zoo: sizes and initializations as published, determinism, derivatives, batching over clients."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace

import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.errors import MissingExtra, ModelError, SpecError
from medpfl.core.tasks import MultiLabel, SingleLabel
from medpfl.federation.client import client_step
from medpfl.models import MODELS, SEGMENTATION, build_model
from medpfl.models.vit import BASE, VisionTransformer

MONAI = ("densenet121", "efficientnet_b0")
VOLUMES = ("cnn3", "cnn_fedavg", "densenet121", "efficientnet_b0", "lenet_cpl", "lenet_dlg", "lenet_idlg")
LARGE = ("vit_b16",)
"""Tested by its size only: every pass takes seconds, and it is `vit` with other numbers."""
SMALLEST = {"densenet121": (32, 32), "efficientnet_b0": (32, 36)}

LENETS = ["lenet_cpl", "lenet_dlg", "lenet_idlg"]


def seeded(seed: int = 0) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


def build(name: str, shape: tuple[int, ...] = (3, 32, 32), classes: int = 10, seed: int = 0) -> GlobalModel:
    """A single-label model."""
    return build_model(name, image_shape=shape, task=SingleLabel(classes), generator=seeded(seed))


@pytest.mark.parametrize(
    ("name", "features", "convolutions"),
    [
        ("lenet_dlg", 768, [(12, 3, 5, 5)] + [(12, 12, 5, 5)] * 3),
        ("lenet_idlg", 768, [(12, 3, 5, 5)] + [(12, 12, 5, 5)] * 2),
        ("lenet_cpl", 40000, [(16, 3, 2, 2)] + [(16, 16, 2, 2)] * 5),
    ],
)
def test_lenets_have_the_published_shapes(name: str, features: int, convolutions: list[tuple[int, ...]]) -> None:
    shapes = [tuple(tensor.shape) for tensor in build(name).parameters.values()]
    assert [shape for shape in shapes if len(shape) == 4] == convolutions
    assert shapes[-2:] == [(10, features), (10,)]


@pytest.mark.parametrize("name", LENETS)
def test_lenets_are_uniform_between_minus_and_plus_one_half(name: str) -> None:
    entries = torch.cat([tensor.flatten() for tensor in build(name).parameters.values()]).numpy()
    assert scipy.stats.kstest(entries, scipy.stats.uniform(-0.5, 1.0).cdf).pvalue > 0.001
    biases = torch.cat([tensor for name, tensor in build(name).parameters.items() if name.endswith("bias")])
    assert biases.abs().max() > 0.4


def test_lenet_dlg_computes_what_the_paper_writes_down() -> None:
    model = build("lenet_dlg")
    images = torch.rand((2, 3, 32, 32), generator=seeded(1))
    tensors = list(model.parameters.values())
    features = images
    for layer, stride in enumerate((2, 2, 1, 1)):
        weight, bias = tensors[2 * layer : 2 * layer + 2]
        features = torch.sigmoid(nn.functional.conv2d(features, weight, bias, stride, 2))
    expected = features.reshape(2, 768) @ tensors[8].T + tensors[9]
    torch.testing.assert_close(model.forward(images)[0], expected, rtol=1e-5, atol=1e-5)


def test_resnet18_has_the_names_and_number_of_the_published_weights() -> None:
    model = build("resnet18", (3, 64, 64), classes=1000)
    assert model.parameter_count == 11_689_512
    names = list(model.parameters)
    assert names[:3] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert names[-2:] == ["fc.weight", "fc.bias"]
    assert model.parameters["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert model.buffers["layer4.1.bn2.running_var"].shape == (512,)
    assert len(model.parameters) == 62
    assert len(model.counters) == 20


def test_resnet18_stems_keep_or_divide_the_resolution() -> None:
    assert build("resnet18").parameters["conv1.weight"].shape == (64, 3, 7, 7)
    assert build("resnet18_cifar").parameters["conv1.weight"].shape == (64, 3, 3, 3)
    assert any(isinstance(layer, nn.MaxPool2d) for layer in build("resnet18").module.modules())
    assert not any(isinstance(layer, nn.MaxPool2d) for layer in build("resnet18_cifar").module.modules())


def test_resnet18_is_initialized_as_he_et_al() -> None:
    model = build("resnet18_cifar")
    for name in ("layer1.0.conv1.weight", "layer3.1.conv2.weight", "layer4.0.downsample.0.weight"):
        weight = model.parameters[name]
        fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
        assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
    assert model.parameters["fc.weight"].abs().max().item() == pytest.approx(1 / math.sqrt(512), rel=0.01)


def test_the_cnn_of_fedavg_has_the_published_number_of_entries() -> None:
    assert build("cnn_fedavg", (1, 28, 28)).parameter_count == 1_663_370


def test_cnn3_computes_three_convolutions_with_pooling() -> None:
    model = build("cnn3")
    images = torch.rand((2, 3, 32, 32), generator=seeded(1))
    tensors = list(model.parameters.values())
    features = images
    for layer in range(3):
        features = nn.functional.conv2d(features, tensors[2 * layer], tensors[2 * layer + 1], padding=1)
        features = nn.functional.max_pool2d(features.clamp_min(0), 2)
    assert features.shape == (2, 128, 4, 4)
    torch.testing.assert_close(model.forward(images)[0], features.flatten(1) @ tensors[6].T + tensors[7])
    assert not model.buffers


def test_vision_transformers_have_the_published_numbers_of_entries() -> None:
    assert build("vit").parameter_count == 3_190_538
    with torch.device("meta"):
        base = VisionTransformer((3, 224, 224), 1000, BASE)
    assert sum(tensor.numel() for tensor in base.parameters()) == 86_567_656


def test_vit_attends_as_pytorch_does() -> None:
    model = build("vit", classes=3)
    layer = nn.MultiheadAttention(256, 4, batch_first=True, bias=True)
    own = model.module.get_submodule("blocks.0.attention")
    own.load_state_dict({name.removeprefix("blocks.0.attention."): tensor for name, tensor in model.parameters.items()
                         if name.startswith("blocks.0.attention.")})  # fmt: skip
    with torch.no_grad():
        layer.in_proj_weight.copy_(model.parameters["blocks.0.attention.qkv.weight"])
        layer.in_proj_bias.zero_()
        layer.out_proj.weight.copy_(model.parameters["blocks.0.attention.out.weight"])
        layer.out_proj.bias.copy_(model.parameters["blocks.0.attention.out.bias"])
    tokens = torch.randn((2, 9, 256), generator=seeded(2))
    torch.testing.assert_close(own(tokens), layer(tokens, tokens, tokens)[0], rtol=1e-4, atol=1e-6)


def test_vit_refuses_sizes_that_are_no_multiples_of_its_patches() -> None:
    with pytest.raises(ModelError, match="multiples of 4"):
        build("vit", (3, 30, 32))
    with pytest.raises(ModelError, match="multiples of 16"):
        build("vit_b16", (3, 32, 40))


@pytest.mark.parametrize("name", MONAI)
def test_models_of_monai_say_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> None:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    monkeypatch.setattr("medpfl.models.monai_nets.importlib.import_module", missing)
    with pytest.raises(MissingExtra, match=r"medpfl\[monai\]"):
        build(name)


def test_monai_has_the_published_densenet121_and_efficientnet_b0() -> None:
    pytest.importorskip("monai", reason="the extra medpfl[monai] is not installed")
    assert build("densenet121", classes=1000).parameter_count == 7_978_856
    assert build("efficientnet_b0", classes=1000).parameter_count == 5_288_548
    with pytest.raises(ModelError, match="at least 32 pixels"):
        build("densenet121", (1, 28, 28))


def awake(model: GlobalModel) -> GlobalModel:
    """With the running statistics of a batch of noise, because deep nets lose the image on untrained ones."""
    if model.name not in MONAI:
        return model
    for layer in model.module.modules():
        if getattr(layer, "functional_batch_norm", False):
            vars(layer)["momentum"] = 1.0
    _, statistics = model.forward(torch.rand((4, *model.image_shape), generator=seeded(3)), batch_norm="train")
    return replace(model, buffers=statistics)


def needs_extra(name: str) -> bool:
    """Whether a model of MONAI is asked for where MONAI is not installed."""
    return name in MONAI and importlib.util.find_spec("monai") is None


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(needs_extra(name), reason="needs the extra medpfl[monai]"))
        for name in MODELS.names()
        if name not in {*LARGE, *SEGMENTATION}
    ],
)
class TestEveryClassifier:
    """Conformance; segmentation models have a file of their own."""

    @pytest.mark.parametrize("color", [False, True])
    @pytest.mark.parametrize("classes", [2, 7])
    def test_takes_grey_and_color_any_size_and_number_of_classes(self, name: str, color: bool, classes: int) -> None:
        shape = (3, *SMALLEST.get(name, (20, 24))) if color else (1, *SMALLEST.get(name, (28, 28)))
        for task in (SingleLabel(classes), MultiLabel(classes)):
            model = build_model(name, image_shape=shape, task=task, generator=seeded())
            output, _ = model.forward(torch.rand((3, *shape), generator=seeded()))
            assert output.shape == (3, classes)
            assert bool(torch.isfinite(output).all())

    def test_depends_on_its_generator_only(self, name: str) -> None:
        before = torch.get_rng_state()
        first = build(name, seed=4)
        torch.manual_seed(123)
        again, other = build(name, seed=4), build(name, seed=5)
        torch.set_rng_state(before)
        MODELS[name].item((3, 32, 32), 4, seeded())
        assert torch.equal(before, torch.get_rng_state())
        for key, tensor in first.parameters.items():
            assert torch.equal(tensor, again.parameters[key])
        assert any(not torch.equal(tensor, other.parameters[key]) for key, tensor in first.parameters.items())

    def test_clients_can_be_batched_and_differentiated_twice(self, name: str) -> None:
        shape = (1, *SMALLEST.get(name, (16, 16)))
        model = awake(build(name, shape, classes=3)).to(torch.float64)
        images = torch.rand((2, 1, *shape), generator=seeded(), dtype=torch.float64)
        targets = torch.tensor([[0], [2]])
        recipe = Recipe(precision="float64")

        def measure(images: Tensor, targets: Tensor) -> Tensor:
            update, _ = client_step(model, Batch(images, targets), recipe)
            return torch.stack([tensor.square().sum() for tensor in update.trainable.values()]).sum()

        slopes = torch.func.vmap(torch.func.grad(measure))(images, targets)
        for client in range(2):
            single = images[client].clone().requires_grad_()
            expected = torch.autograd.grad(measure(single, targets[client]), single)[0]
            torch.testing.assert_close(slopes[client], expected, rtol=1e-8, atol=1e-10)
            assert bool(expected.abs().max() > 0)

    def test_one_dimensional_images_are_refused(self, name: str) -> None:
        with pytest.raises(ModelError, match="channels, height, width"):
            build(name, (3, 32))

    def test_takes_volumes_or_refuses_them(self, name: str) -> None:
        shape = (1, *(2 * (SMALLEST.get(name, (16, 16))[0],)), 12 if name not in SMALLEST else 32)
        if name not in VOLUMES:
            with pytest.raises(ModelError, match="channels, height, width"):
                build(name, shape)
            return
        model = build(name, shape, classes=2)
        images = torch.rand((1, *shape), generator=seeded())
        update, _ = client_step(model, Batch(images, torch.tensor([1])), Recipe())
        assert all(bool(torch.isfinite(tensor).all()) for tensor in update.trainable.values())
        assert any(tensor.ndim == 5 and bool(tensor.any()) for tensor in update.trainable.values())


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(SpecError, match="'lenet_dlg'"):
        build("lenet_dgl")

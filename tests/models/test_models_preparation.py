"""Anybody's module as a global model."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.errors import ModelError
from medpfl.core.tasks import SingleLabel
from medpfl.models import Normalization, prepare

SHAPE = (1, 8, 8)


def prepared(module: nn.Module, **options: Any) -> GlobalModel:
    """A global model of two classes."""
    return prepare(module, name="mine", image_shape=SHAPE, task=SingleLabel(2), **options)


def images(count: int = 3) -> Tensor:
    """Random images."""
    return torch.rand((count, *SHAPE), generator=torch.Generator().manual_seed(0))


def head(inputs: int = 64) -> nn.Module:
    """Flatten and classify."""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 2))


def test_the_callers_module_stays_as_it_is() -> None:
    norm, activation = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), norm, activation, head(144)).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = prepared(module)
    output, buffers = model.forward(images(), batch_norm="train")
    assert module.training
    assert module[1] is norm
    assert activation.inplace
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    torch.testing.assert_close(output, module(images()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(buffers["1.running_mean"], norm.running_mean)
    with torch.no_grad():
        module.get_parameter("0.weight").zero_()
    assert bool(model.parameters["0.weight"].any())


def test_tensors_are_told_apart() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Conv2d(1, 2, 1).requires_grad_(False)
            self.free = nn.Linear(128, 2)
            self.register_buffer("level", torch.tensor(0.5))
            self.register_buffer("seen", torch.tensor(3))
            self.register_buffer("table", torch.ones(64), persistent=False)

        def forward(self, images: Tensor) -> Tensor:
            scores: Tensor = self.free((self.frozen(images) + self.get_buffer("level")).flatten(1))
            return scores * self.get_buffer("table").mean()

    model = prepared(Mixed())
    assert list(model.parameters) == ["free.weight", "free.bias"]
    assert list(model.buffers) == ["level"]
    assert list(model.counters) == ["seen"]
    assert sorted(model.constants) == ["frozen.bias", "frozen.weight", "table"]
    assert model.to(torch.float64).forward(images().double())[0].dtype == torch.float64


def test_tied_weights_appear_once_and_stay_tied() -> None:
    from medpfl.federation.client import client_step

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64, bias=False)
            self.second = nn.Linear(64, 64, bias=False)
            self.second.weight = self.first.weight
            self.head = nn.Linear(64, 2)

        def forward(self, images: Tensor) -> Tensor:
            scores: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(images.flatten(1))))))
            return scores

    module = Tied()
    model = prepared(module)
    assert list(model.parameters) == ["first.weight", "head.weight", "head.bias"]
    targets = torch.tensor([0, 1, 1])
    update, _ = client_step(model, Batch(images(), targets), Recipe(batch_size=3))
    torch.autograd.backward(nn.functional.cross_entropy(module(images()), targets))
    torch.testing.assert_close(update.trainable["first.weight"], module.first.weight.grad)


def test_normalization_is_the_first_layer() -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 3), head(72))
    model = prepare(
        module, name="mine", image_shape=(3, 8, 8), task=SingleLabel(2),
        normalize=Normalization(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0)),
    )  # fmt: skip
    pictures = torch.rand((2, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    normalized = torch.stack(
        [(pictures[:, 0] - 0.1) / 0.5, (pictures[:, 1] - 0.2) / 0.25, (pictures[:, 2] - 0.3) / 2], 1
    )
    torch.testing.assert_close(model.forward(pictures)[0], module(normalized))
    assert set(model.parameters) == {f"body.{name}" for name, _ in module.named_parameters()}


@pytest.mark.parametrize(
    ("normalize", "words"),
    [
        (Normalization(mean=(0.5, 0.5), std=(1.0, 1.0)), "mean has 2"),
        (Normalization(mean=(0.5,), std=(0.0,)), "above 0"),
    ],
)
def test_normalization_must_fit_the_channels(normalize: Normalization, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        prepared(head(), normalize=normalize)


class Attentive(nn.Module):
    """Patches, attention, dense layer; attention as a layer or as a function."""

    def __init__(self, layer: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True) if layer else None
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        if self.attention is None:
            mixed = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        else:
            mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        scores: Tensor = self.head(torch.tanh(mixed).mean(dim=1))
        return scores


@pytest.mark.parametrize("layer", [True, False])
def test_attention_can_be_differentiated_twice_and_batched(layer: bool) -> None:
    from medpfl.federation.client import client_step

    model = prepared(Attentive(layer))

    def measure(images: Tensor) -> Tensor:
        update, _ = client_step(model, Batch(images, torch.tensor([1])), Recipe(precision="float64"))
        return torch.stack([tensor.square().sum() for tensor in update.trainable.values()]).sum()

    pictures = images(2).double()[:, None]
    slopes = torch.func.vmap(torch.func.grad(measure))(pictures)
    step = 1e-5 * torch.ones_like(pictures[0])
    with torch.no_grad():
        difference = (measure(pictures[0] + step) - measure(pictures[0] - step)) / 2e-5
    torch.testing.assert_close(slopes[0].sum(), difference, rtol=1e-4, atol=1e-8)


def test_models_travel_to_other_processes() -> None:
    model = prepared(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), head(144)),
        normalize=Normalization(mean=(0.5,), std=(0.2,)),
    )
    copied = pickle.loads(pickle.dumps(model))  # noqa: S301
    torch.testing.assert_close(copied.forward(images())[0], model.forward(images())[0])


class Returning(nn.Module):
    """Answers with whatever it is told to."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.answer = answer

    def forward(self, images: Tensor) -> Any:
        """The answer, as a function of weight and images."""
        return self.answer(self, images)


def whole_numbers(module: Any, images: Tensor) -> Tensor:
    """A forward pass that decides instead of scoring."""
    decisions: Tensor = (images.flatten(1)[:, :2] * module.weight).long()
    return decisions


def raising(module: nn.Module, images: Tensor) -> Tensor:
    """A forward pass that fails."""
    raise ArithmeticError("no such luck")


def counting(module: Any, images: Tensor) -> Tensor:
    """A forward pass that keeps score."""
    module.total.add_(images.mean())
    scores: Tensor = images.flatten(1)[:, :2] * module.weight + module.total
    return scores * 0


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda m, x: m.weight * x.flatten(1)[:, :3], r"\(2, 3\), expected \(2, 2\)"),
        (lambda m, x: m.weight * x, r"\(2, 1, 8, 8\), expected \(2, 2\)"),
        (lambda m, x: (m.weight * x.flatten(1)[:, :2], None), "returns tuple"),
        (lambda m, x: m.weight * x.flatten(1)[:, :2] * float("nan"), "not finite"),
        (lambda m, x: m.weight * torch.rand(len(x), 2), "different outputs"),
        (whole_numbers, "floating-point"),
        (raising, "ArithmeticError: no such luck"),
    ],
)
def test_forward_passes_that_do_not_fit_are_refused(answer: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words) as error:
        prepared(Returning(answer))
    assert "'mine'" in str(error.value)
    assert "\n" not in str(error.value)


def test_state_that_depends_on_the_data_is_refused() -> None:
    module = Returning(counting)
    module.register_buffer("total", torch.zeros(1))
    with pytest.raises(ModelError, match="changes its own tensor 'total'"):
        prepared(module)


def with_complex_weight() -> nn.Module:
    """A module with a complex parameter."""
    module = head()
    module.register_parameter("phase", nn.Parameter(torch.ones(1, dtype=torch.complex64)))
    return module


class NamedNorm(nn.BatchNorm2d):
    """A batch norm that could do anything."""


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Sequential(nn.Flatten(2), nn.LSTM(64, 2)), "recurrent"),
        (nn.Sequential(nn.LazyLinear(2)), "no shape yet"),
        (nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True), head()), "instance norm"),
        (nn.Sequential(NamedNorm(1), head()), "NamedNorm"),
        (head().requires_grad_(False), "no trainable parameter"),
        (nn.DataParallel(head()), "DataParallel"),
        (with_complex_weight(), "complex"),
    ],
)
def test_layers_that_cannot_be_treated_are_refused_with_the_reason(module: nn.Module, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        prepared(module)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused_with_the_reason() -> None:
    with pytest.raises(ModelError, match="TorchScript"):
        prepared(torch.jit.script(head()))

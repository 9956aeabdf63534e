"""Each finding appears for the models that it is about, and for no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from medpfl.core.domain import Recipe
from medpfl.core.tasks import MultiLabel, Segmentation, SingleLabel, Task
from medpfl.models import MODELS, SEGMENTATION, VALIDATORS, Finding, build_model, prepare, validate

SHAPE = (1, 8, 8)


def findings(module: nn.Module, recipe: Recipe | None = None, task: Any = None) -> dict[str, Finding]:
    """Findings by code."""
    model = prepare(module, name="mine", image_shape=SHAPE, task=task or SingleLabel(3))
    return {finding.code: finding for finding in validate(model, recipe)}


def smooth(*middle: nn.Module, bias: bool = True, channels: int = 2) -> nn.Module:
    """Convolution, the layers in question, dense layer."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3), *middle, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 3, bias=bias)
    )


class Functional(nn.Module):
    """Calls functions instead of layers."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.function = function
        self.fc = nn.Linear(72, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores."""
        scores: Tensor = self.fc(self.function(self.conv(images)).flatten(1))
        return scores


def test_a_plain_smooth_model_has_nothing_to_warn_of() -> None:
    found = findings(smooth(nn.Tanh()))
    assert list(found) == ["parameters_per_pixel"]
    assert "47 trainable entries for 64 private pixels (0.734 each): fewer" in found["parameters_per_pixel"].message


def test_parameters_are_counted_against_all_private_pixels() -> None:
    message = findings(smooth(nn.Tanh(), channels=20), Recipe(batch_size=8))["parameters_per_pixel"].message
    assert "443 trainable entries for 512 private pixels" in message
    assert "enough equations" in findings(smooth(nn.Tanh(), channels=20))["parameters_per_pixel"].message


@pytest.mark.parametrize(("mode", "code"), [("train", "batch_norm_train"), ("eval", "batch_norm_eval")])
def test_batch_norm_means_something_else_in_each_mode(mode: Any, code: str) -> None:
    found = findings(smooth(nn.BatchNorm2d(2), nn.Tanh()), Recipe(batch_norm=mode))
    assert found[code].severity == "warning"
    assert len([name for name in found if name.startswith("batch_norm")]) == 1


def test_batch_norm_on_single_values_is_refused_before_training() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 8), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 3))
    single = findings(module, Recipe(batch_norm="train"))["batch_norm_single_value"]
    assert single.severity == "refusal"
    assert "batch_norm_single_value" not in findings(module, Recipe(batch_norm="train", batch_size=2))
    assert "batch_norm_single_value" not in findings(module, Recipe(batch_norm="eval"))
    last_is_single = Recipe(update="delta", batch_norm="train", batch_size=2, local_steps=2, images=3)
    assert "batch_norm_single_value" in findings(module, last_is_single)
    accumulated = Recipe(batch_norm="train", batch_size=4, accumulation=4)
    assert "batch_norm_single_value" in findings(module, accumulated)


@pytest.mark.parametrize(
    "module",
    [
        smooth(nn.Dropout(0.3), nn.Tanh()),
        smooth(nn.Dropout2d(0.3)),
        Functional(lambda x: nn.functional.dropout(x, 0.1, False)),
    ],
)
def test_dropout_is_said_to_be_off(module: nn.Module) -> None:
    assert "dropout is off" in findings(module)["dropout"].message


@pytest.mark.parametrize(
    "module",
    [
        smooth(nn.ReLU()),
        smooth(nn.ReLU(inplace=True)),
        smooth(nn.LeakyReLU()),
        smooth(nn.Hardtanh()),
        Functional(torch.relu),
        Functional(lambda x: x.relu()),
        Functional(nn.functional.leaky_relu),
    ],
)
def test_activations_without_second_derivatives_are_named(module: nn.Module) -> None:
    assert findings(module)["piecewise_linear_activations"].severity == "warning"


@pytest.mark.parametrize(
    "function", [torch.sigmoid, torch.tanh, nn.functional.gelu, nn.functional.silu, nn.functional.elu]
)
def test_smooth_activations_are_not(function: Any) -> None:
    assert "piecewise_linear_activations" not in findings(Functional(function))


@pytest.mark.parametrize(
    "module",
    [
        smooth(nn.MaxPool2d(2)),
        smooth(nn.AdaptiveMaxPool2d(3)),
        nn.Sequential(Functional(lambda x: nn.functional.max_pool2d(x, 1))),
    ],
)
def test_max_pooling_is_mentioned(module: nn.Module) -> None:
    assert "max_pooling" in findings(module)
    assert "max_pooling" not in findings(smooth(nn.AvgPool2d(2)))


def test_a_last_layer_without_bias_or_not_dense_hides_labels() -> None:
    assert "labels cannot be inferred" in findings(smooth(nn.Tanh(), bias=False))["last_layer_without_bias"].message
    convolutional = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert "last_layer_not_dense" in findings(convolutional)


def test_a_dense_first_layer_leaks() -> None:
    dense = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3))
    assert "exactly" in findings(dense)["dense_first_layer"].message
    without_bias = nn.Sequential(nn.Flatten(), nn.Linear(64, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
    assert "dense_first_layer" not in findings(without_bias)
    frozen = nn.Sequential(nn.Flatten(), nn.Linear(64, 5).requires_grad_(False), nn.Tanh(), nn.Linear(5, 3))
    assert "dense_first_layer" not in findings(frozen)


def test_frozen_layers_are_counted() -> None:
    module = smooth(nn.Tanh())
    module.get_submodule("0").requires_grad_(False)
    assert "2 frozen tensors (20 entries" in findings(module)["frozen_layers"].message


@pytest.mark.parametrize(
    ("last", "task"), [(nn.Softmax(dim=1), SingleLabel(3)), (nn.Sigmoid(), MultiLabel(3))], ids=["softmax", "sigmoid"]
)
def test_probabilities_instead_of_scores_are_noticed(last: nn.Module, task: Any) -> None:
    assert "outputs_are_probabilities" in findings(nn.Sequential(smooth(nn.Tanh()), last), task=task)
    assert "outputs_are_probabilities" not in findings(smooth(nn.Tanh()), task=task)


def test_float16_with_local_steps_is_warned_of() -> None:
    assert "float16_skipped_steps" in findings(smooth(nn.Tanh()), Recipe(update="delta", precision="float16"))
    assert "float16_skipped_steps" not in findings(smooth(nn.Tanh()), Recipe(precision="float16"))


def fused(values: Tensor) -> Tensor:
    """Insists on a fused attention kernel, which has no second derivative."""
    tokens = values.flatten(2)[:, None]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)


class SquareWithoutSecondDerivative(torch.autograd.Function):
    """Squares; what PyTorch makes of its second derivative is silently zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        """The squares."""
        return values.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the input."""
        del output
        ctx.save_for_backward(inputs[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Twice the input."""
        (values,) = ctx.saved_tensors
        return gradient * 2 * values


def branching(values: Tensor) -> Tensor:
    """Looks at its input to decide what to do, which cannot be batched."""
    return values * 2 if float(values.detach().mean()) > 0 else values * 3


def test_what_attacks_need_is_tried() -> None:
    assert findings(Functional(fused))["not_twice_differentiable"].severity == "refusal"
    once = findings(Functional(SquareWithoutSecondDerivative.apply))
    assert once["second_derivative_wrong"].severity == "warning"
    assert findings(Functional(lambda x: torch.tanh(x.float())))["no_float64"].severity == "warning"
    assert findings(Functional(lambda x: torch.tanh(branching(x))))["no_batching"].severity == "warning"


def test_derivatives_are_tried_on_request_only() -> None:
    model = prepare(Functional(fused), name="mine", image_shape=SHAPE, task=SingleLabel(3))
    codes = [finding.code for finding in validate(model, try_derivatives=False)]
    assert codes == ["parameters_per_pixel"]


def test_refusals_come_first_and_every_validator_has_a_summary() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 8), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 3))
    order = [finding.severity for finding in findings(module, Recipe(batch_norm="train")).values()]
    assert order == sorted(order, key=["refusal", "warning", "info"].index)
    assert order[0] == "refusal"
    assert all(entry.summary for entry in VALIDATORS)


def test_outputs_that_do_not_depend_on_the_image_are_told() -> None:
    class Faint(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale
            self.fc = nn.Linear(64, 3)

        def forward(self, images: Tensor) -> Tensor:
            output: Tensor = self.fc(self.scale * images.flatten(1))
            return output

    assert findings(Faint(1e-9))["vanishing_signal"].severity == "warning"
    assert "vanishing_signal" not in findings(Faint(1.0))


class Patches(nn.Module):
    """Patches of 4x4 with a position embedding that may be frozen."""

    def __init__(self, trained: bool, kernel: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(1, 5, kernel, stride=4)
        self.positions = nn.Parameter(torch.rand(1, 4, 5), requires_grad=trained)
        self.fc = nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embedding(images).flatten(2).transpose(1, 2) + self.positions
        output: Tensor = self.fc(tokens.tanh().mean(dim=1))
        return output


def test_trained_position_embeddings_are_told_to_give_the_patches_away() -> None:
    finding = findings(Patches(trained=True))["patch_embedding"]
    assert finding.severity == "warning"
    assert "'positions'" in finding.message
    assert "all 4 patches" in finding.message
    assert "april" in finding.message
    assert "patch_embedding" not in findings(Patches(trained=False))
    assert "patch_embedding" not in findings(Patches(trained=True, kernel=3))


def zoo(name: str) -> dict[str, str]:
    """Severities by code, for a model of the zoo on the smallest grey images that all of its kind take."""
    side = 32 if name in ("densenet121", "efficientnet_b0") else 16
    if name in ("densenet121", "efficientnet_b0", "unet"):
        pytest.importorskip("monai", reason="the extra medpfl[monai] is not installed")
    generator = torch.Generator().manual_seed(0)
    task: Task = Segmentation(3) if name in SEGMENTATION else SingleLabel(3)
    model = build_model(name, image_shape=(1, side, side), task=task, generator=generator)
    return {finding.code: finding.severity for finding in validate(model, Recipe())}


@pytest.mark.parametrize("name", sorted({*MODELS.names()} - {"vit_b16"}))
def test_the_zoo_can_be_audited(name: str) -> None:
    found = zoo(name)
    assert "refusal" not in found.values()
    assert not {"second_derivative_wrong", "second_derivative_not_finite", "no_float64", "no_batching"} & set(found)
    kinked = ("resnet18", "resnet18_cifar", "cnn3", "cnn_fedavg", "densenet121", "unet", "unet_small")
    assert ("piecewise_linear_activations" in found) == (name in kinked)
    assert ("max_pooling" in found) == (name in ("resnet18", "cnn3", "cnn_fedavg", "densenet121", "unet_small"))
    assert ("patch_embedding" in found) == (name == "vit")
    assert ("masks_as_targets" in found) == (name in SEGMENTATION)
    assert ("dropout" in found) == ("vanishing_signal" in found) == (name == "efficientnet_b0")

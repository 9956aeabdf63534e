"""The functional batch norm against PyTorch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from medpfl.core.errors import ModelError
from medpfl.models.batch_norm import FunctionalBatchNorm, replace_batch_norm

SHAPES: dict[int, tuple[int, ...]] = {1: (5, 3), 2: (4, 3, 5, 6), 3: (3, 3, 2, 4, 3)}
KINDS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.4, "eps": 1e-2},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
]


def images(axes: int, seed: int = 0) -> Tensor:
    """Inputs with another mean and spread in each channel."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(SHAPES[axes], generator=generator, dtype=torch.float64)
    return values * 2 + torch.arange(3, dtype=torch.float64).view(1, -1, *[1] * (values.dim() - 2))


def layer_pair(axes: int, options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """PyTorch's layer after two batches of training, and our form of it."""
    theirs = KINDS[axes](3, **options).double()
    if theirs.affine:
        nn.init.uniform_(theirs.weight, 0.5, 2.0)
        nn.init.uniform_(theirs.bias, -1.0, 1.0)
    theirs.train()
    theirs(images(axes, 5))
    theirs(images(axes, 6))
    return theirs, replace_batch_norm(copy.deepcopy(theirs))


def run(layer: nn.Module, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and the state that a functional call hands back."""
    state = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    output = functional_call(layer, state, (inputs,))
    return output, state


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_equals_pytorch_with_its_running_statistics(axes: int, options: dict[str, Any], training: bool) -> None:
    theirs, ours = layer_pair(axes, options)
    assert isinstance(ours, FunctionalBatchNorm)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.train(training)
    ours.train(training)
    output, state = run(ours, images(axes))
    torch.testing.assert_close(output, theirs(images(axes)), rtol=1e-12, atol=1e-12)
    for name, tensor in theirs.state_dict().items():
        if name != "num_batches_tracked":
            torch.testing.assert_close(state[name], tensor, rtol=1e-12, atol=1e-12)


def test_nothing_is_written_in_place() -> None:
    _, ours = layer_pair(2, {})
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    run(ours.train(), images(2))
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_equal_pytorch(training: bool) -> None:
    results = []
    for layer in layer_pair(2, {}):
        layer.train(training)
        inputs = images(2).requires_grad_()
        parameters = list(layer.parameters())
        gradients = torch.autograd.grad(layer(inputs).pow(3).sum(), parameters, create_graph=True)
        results.append(torch.autograd.grad(torch.stack([g.pow(2).sum() for g in gradients]).sum(), inputs)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batched_clients_in_train_mode_have_their_own_statistics(momentum: float | None) -> None:
    _, ours = layer_pair(2, {"momentum": momentum})
    ours.train()
    clients = torch.stack([images(2, seed) for seed in range(3)])

    def one(inputs: Tensor) -> tuple[Tensor, Tensor]:
        output, state = run(ours, inputs)
        return output, state["running_var"]

    outputs, variances = torch.func.vmap(one)(clients)
    for client in range(3):
        output, variance = one(clients[client])
        torch.testing.assert_close(outputs[client], output, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(variances[client], variance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_have_float32_statistics(dtype: torch.dtype) -> None:
    layer = nn.BatchNorm2d(3)
    ours = replace_batch_norm(copy.deepcopy(layer)).train()
    inputs = images(2).to(dtype)
    output, state = run(ours, inputs)
    expected = layer.train()(inputs)
    assert output.dtype == expected.dtype == dtype
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(state["running_var"], layer.running_var, rtol=1e-5, atol=1e-6)


def test_one_value_per_channel_is_refused_as_in_pytorch() -> None:
    theirs, ours = layer_pair(2, {})
    single = images(2)[:1, :, :1, :1]
    with pytest.raises(ValueError, match="more than 1 value"):
        theirs.train()(single)
    with pytest.raises(ModelError, match="one value per channel"):
        ours.train()(single)
    ours.eval()(single)


def test_layers_inside_are_replaced_once_and_keep_their_names() -> None:
    shared = nn.BatchNorm2d(3)
    module = nn.ModuleDict(
        {"one": shared, "two": nn.Sequential(nn.Conv2d(3, 3, 1), shared), "sync": nn.SyncBatchNorm(3)}
    )
    names = list(module.state_dict())
    replaced = replace_batch_norm(module)
    assert list(replaced.state_dict()) == names
    assert replaced.get_submodule("one") is replaced.get_submodule("two.1")
    assert isinstance(replaced.get_submodule("sync"), FunctionalBatchNorm)
    assert replace_batch_norm(nn.BatchNorm1d(2)).state_dict().keys() == nn.BatchNorm1d(2).state_dict().keys()

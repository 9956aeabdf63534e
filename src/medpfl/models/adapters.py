"""Low-rank adapters beside dense and convolution layers, in the functional form that the project's models have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional

from medpfl.core.domain import GlobalModel

CONVOLUTION: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}
"""Convolution layers that adapters can be put beside, and what computes them."""

FACTORS = ("lora_A", "lora_B")


class AdaptedDense(nn.Module):
    """A dense layer W x + b with scale * B A x added: A (rank, inputs), B (units, rank)."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = layer.weight, layer.bias, scale
        self.lora_A = nn.Parameter(torch.zeros(rank, layer.in_features))
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        """As the layer's own, with the adapter's part added."""
        low = functional.linear(functional.linear(inputs, self.lora_A), self.lora_B)
        return functional.linear(inputs, self.weight, self.bias) + self.scale * low


class AdaptedConvolution(nn.Module):
    """A convolution with a thin one of `rank` channels (A, of its kernel, stride and padding) and a 1x1 one (B) added."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, rank: int, scale: float) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = layer.weight, layer.bias, scale
        self.lora_A = nn.Parameter(torch.zeros(rank, *layer.weight.shape[1:]))
        self.lora_B = nn.Parameter(torch.zeros(layer.out_channels, rank, *(1,) * (layer.weight.ndim - 2)))
        self.convolve = CONVOLUTION[type(layer)]
        self.settings = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}

    def forward(self, inputs: Tensor) -> Tensor:
        """As the layer's own, with the adapter's part added."""
        low = self.convolve(self.convolve(inputs, self.lora_A, **self.settings), self.lora_B)
        return self.convolve(inputs, self.weight, self.bias, **self.settings) + self.scale * low


def adaptable(model: GlobalModel, pattern: str = "*") -> list[str]:
    """Paths of the dense and plain convolution layers with trainable weights that adapters can be put beside."""
    return [
        path
        for path, layer in model.module.named_modules()
        if path and f"{path}.weight" in model.parameters and fnmatchcase(path, pattern) and _is_plain(layer)
    ]


def with_adapters(
    model: GlobalModel, paths: list[str], *, rank: int, scale: float, full: list[str], generator: torch.Generator
) -> GlobalModel:
    """The model with adapters beside the layers at `paths`; all else is frozen but the tensors of the layers in `full`.

    A is uniform within 1 / sqrt(inputs of a unit), B is zero, so that the model computes what it did. Adapters are
    named `LAYER.lora_A` and `LAYER.lora_B`; trainable tensors keep the order of the module's layers.
    """
    module = copy.deepcopy(model.module)
    drawn: dict[str, Tensor] = {}
    like = next(iter(model.parameters.values()))
    for path in paths:
        parent, _, name = path.rpartition(".")
        layer = module.get_submodule(path)
        kind = AdaptedDense if isinstance(layer, nn.Linear) else AdaptedConvolution
        adapted = kind(layer, rank, scale)  # type: ignore[arg-type]
        setattr(module.get_submodule(parent), name, adapted)
        bound = adapted.lora_A[0].numel() ** -0.5
        values = 2.0 * torch.rand(adapted.lora_A.shape, dtype=torch.float64, generator=generator) - 1.0
        drawn[f"{path}.lora_A"] = (bound * values).to(like)
        drawn[f"{path}.lora_B"] = torch.zeros_like(adapted.lora_B, dtype=like.dtype, device=like.device)
    trained = {name for name in model.parameters if name.rpartition(".")[0] in full}
    available = {**model.parameters, **drawn}
    parameters = {name: available[name] for name, _ in module.named_parameters() if name in drawn or name in trained}
    frozen = {name: tensor for name, tensor in model.parameters.items() if name not in parameters}
    return replace(model, module=module, parameters=parameters, constants={**model.constants, **frozen})


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is computed by its weights and settings alone, as its class says."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return type(layer) in CONVOLUTION and layer.groups == 1 and layer.padding_mode == "zeros"
    return type(layer) is nn.Linear

"""Batch norm out of elementary operations, so that vmap and double backward work and nothing is written in place."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medpfl.core.domain import GlobalModel, Tensors
from medpfl.core.errors import ModelError

LOW_PRECISION = (torch.float16, torch.bfloat16)

TREATED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Batch norm layers that are replaced. Subclasses are not: they may compute something else."""


class FunctionalBatchNorm(nn.Module):
    """What `nn.BatchNorm1d/2d/3d` and `nn.SyncBatchNorm` compute, for inputs (N, C, *spatial) with N * spatial > 1.

    In train mode the new running statistics are assigned to `running_mean` and `running_var` (never written in place),
    so `torch.func.functional_call` hands them back; the counter `num_batches_tracked` is read but not advanced: the
    client step adds one per forward pass. The state dict is that of the layer it was made from. Statistics of float16
    and bfloat16 inputs are computed in float32, as PyTorch does. Raises `ModelError` in train mode if there is only
    one value per channel.
    """

    functional_batch_norm = True

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, source: _BatchNorm) -> None:
        super().__init__()
        self.num_features = source.num_features
        self.eps = source.eps
        self.momentum = source.momentum
        self.weight = source.weight
        self.bias = source.bias
        self.register_buffer("running_mean", source.running_mean)
        self.register_buffer("running_var", source.running_var)
        self.register_buffer("num_batches_tracked", source.num_batches_tracked)
        self.train(source.training)

    def forward(self, images: Tensor) -> Tensor:
        """Normalizes each channel; same shape and precision as the input."""
        values = images.float() if images.dtype in LOW_PRECISION else images
        shape = [1, -1] + [1] * (values.dim() - 2)
        if self.training or self.running_mean is None or self.running_var is None:
            mean, variance = self._batch_statistics(values)
        else:
            mean, variance = self.running_mean, self.running_var
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        return (values * scale.view(shape) + shift.view(shape)).to(images.dtype)

    def _batch_statistics(self, values: Tensor) -> tuple[Tensor, Tensor]:
        axes = [axis for axis in range(values.dim()) if axis != 1]
        count = values.numel() // values.shape[1]
        if self.training and count < 2:
            raise ModelError(
                f"batch norm in train mode met one value per channel (input {tuple(values.shape)}): "
                "train on more images per step or set batch_norm: eval in the recipe"
            )
        variance, mean = torch.var_mean(values, dim=axes, correction=0)
        if self.training and self.running_mean is not None and self.running_var is not None:
            factor = self._averaging_factor(values.dtype)
            unbiased = variance * (count / (count - 1))
            self.running_mean = self.running_mean + factor * (mean - self.running_mean)
            self.running_var = self.running_var + factor * (unbiased - self.running_var)
        return mean, variance

    def _averaging_factor(self, dtype: torch.dtype) -> Tensor | float:
        if self.momentum is not None:
            return self.momentum
        counter = cast(Tensor, self.num_batches_tracked)
        return 1.0 / (counter + 1).to(dtype)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


def replace_batch_norm(module: nn.Module) -> nn.Module:
    """Puts `FunctionalBatchNorm` in place of every batch norm layer of `module`, in place, and returns the module."""

    def functional(layer: nn.Module) -> nn.Module | None:
        return FunctionalBatchNorm(layer) if isinstance(layer, _BatchNorm) and type(layer) in TREATED else None

    return replace_layers(module, functional)


def replace_layers(module: nn.Module, new: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Puts what `new` gives in place of every layer for which it gives one, in place, and returns the module.

    A layer that is used under several names stays one layer.
    """
    replacements: dict[int, nn.Module | None] = {}

    def replaced(layer: nn.Module) -> nn.Module:
        if id(layer) not in replacements:
            replacements[id(layer)] = new(layer)
        return replacements[id(layer)] or layer

    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            setattr(parent, name, replaced(child))
    return replaced(module)


Statistics = dict[str, tuple[Tensor, Tensor]]
"""Batch norm layer -> mean and variance (without Bessel's correction) per channel of what it receives: (C,) each."""


def batch_norm_layers(model: GlobalModel) -> dict[str, FunctionalBatchNorm]:
    """The batch norm layers of a prepared model by their paths, in the order of the module."""
    return {path: layer for path, layer in model.module.named_modules() if isinstance(layer, FunctionalBatchNorm)}


def forward_with_statistics(
    model: GlobalModel,
    images: Tensor,
    layers: Collection[str],
    *,
    parameters: Tensors | None = None,
    batch_norm: Literal["train", "eval"] = "eval",
) -> tuple[Tensor, Statistics]:
    """The model's output for images (N, C, *spatial), and statistics of what the named batch norm layers receive.

    The output is that of `GlobalModel.forward`; all is differentiable in images and parameters. Of a layer that runs
    several times the last time counts, one that never runs is left out.
    """
    found: Statistics = {}

    def keep(path: str, received: Tensor) -> None:
        variance, mean = torch.var_mean(received, dim=[0, *range(2, received.dim())], correction=0)
        found[path] = (mean, variance)

    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, path=path: keep(path, inputs[0]))
        for path, layer in batch_norm_layers(model).items()
        if path in layers
    ]
    try:
        output, _ = model.forward(images, parameters=parameters, batch_norm=batch_norm)
    finally:
        for handle in handles:
            handle.remove()
    return output, found

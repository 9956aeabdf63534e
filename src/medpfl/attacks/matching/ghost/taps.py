"""A copy of a model whose layers tell what went in and came out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medpfl.attacks.matching.ghost.convolution import Convolution, Sliding
from medpfl.attacks.matching.ghost.layers import Affine, Layer, Linear
from medpfl.core.domain import GlobalModel
from medpfl.models.batch_norm import FunctionalBatchNorm, Statistics

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Call:
    """One use of a layer in a forward pass: input (after normalization, for an affine layer) and output."""

    layer: Layer
    a: Tensor
    z: Tensor


@dataclass
class Tapped:
    """A tapped copy of one model. `module` maps images to outputs; `calls` and `statistics` (mean and variance (A, C) of
    what recorded batch norm layers receive) are those of a running forward pass.
    """

    module: nn.Module
    calls: list[Call] = field(default_factory=list)
    statistics: Statistics = field(default_factory=dict)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Call], Statistics]:
        """Outputs for candidate-major images, the calls of the layers in order, and the recorded statistics."""
        self.calls.clear()
        output = self.module(images)
        calls, statistics = list(self.calls), dict(self.statistics)
        self.calls.clear()
        self.statistics.clear()
        return output, calls, statistics


def tap(
    model: GlobalModel,
    names: Sequence[str],
    examples: int,
    batch_norm: Literal["train", "eval"],
    recorded: Sequence[str] = (),
) -> Tapped | None:
    """A tapped copy that reports the layers of the tensors `names`; None if one of them belongs to no known layer.

    examples: images per candidate, over which batch norm takes its statistics in train mode. recorded: paths of batch
    norm layers whose statistics over a candidate's images are reported.
    """
    wanted = set(names)
    shell = Tapped(nn.Identity())
    shell.module = _holding(model)
    reported: list[str] = []
    for path, layer in list(shell.module.named_modules()):
        found = _known(layer, path, wanted)
        if isinstance(layer, FunctionalBatchNorm):
            affine = found if isinstance(found, Affine) else None
            replaced = CandidateNorm(layer, examples, batch_norm == "train", affine, shell.calls)
            if path in recorded:
                replaced.record = partial(shell.statistics.__setitem__, path)
            shell.module = _put(shell.module, path, replaced)
        elif isinstance(layer, nn.modules.conv._ConvNd) and _slides_plainly(layer):
            convolution = found if isinstance(found, Convolution) else None
            shell.module = _put(shell.module, path, OwnConvolution(layer, convolution, shell.calls))
        elif isinstance(layer, nn.GroupNorm | nn.LayerNorm) and found is not None:
            shell.module = _put(shell.module, path, OwnNorm(layer, found, shell.calls))
        elif isinstance(layer, nn.PReLU) and found is not None:
            shell.module = _put(shell.module, path, OwnPReLU(layer.weight, found, shell.calls))
        elif found is not None:
            layer.register_forward_hook(_recorder(found, shell.calls))
        reported += found.names if found is not None else ()
    return shell if sorted(reported) == sorted(wanted) else None


def _holding(model: GlobalModel) -> nn.Module:
    """A copy of the module that holds the model's own tensors, none of which requires a gradient."""
    memo = {id(tensor): tensor for tensor in [*model.module.parameters(), *model.module.buffers()]}
    module = copy.deepcopy(model.module, memo)
    tensors = {**model.parameters, **model.buffers, **model.counters, **model.constants}
    held: dict[int, Tensor] = {}
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        held[id(named[name])] = tensor
    for path, old in named.items():
        owner, _, attribute = path.rpartition(".")
        new = held[id(old)].detach()
        parent = module.get_submodule(owner)
        if isinstance(old, nn.Parameter):
            setattr(parent, attribute, nn.Parameter(new, requires_grad=False))
        else:
            setattr(parent, attribute, new)
    return module


def _put(root: nn.Module, path: str, layer: nn.Module) -> nn.Module:
    if not path:
        return layer
    owner, _, attribute = path.rpartition(".")
    setattr(root.get_submodule(owner), attribute, layer)
    return root


def _known(layer: nn.Module, path: str, wanted: set[str]) -> Layer | None:
    """What matching knows of this very layer; None if it has no wanted tensor or is of another kind."""
    prefix = f"{path}." if path else ""
    weight, bias = (f"{prefix}{name}" if f"{prefix}{name}" in wanted else None for name in ("weight", "bias"))
    if weight is None and bias is None:
        return None
    if type(layer) is nn.Linear:
        return Linear(weight, bias)
    if isinstance(layer, nn.modules.conv._ConvNd) and _slides_plainly(layer):
        return Convolution(weight, bias, layer.weight.detach(), _sliding(layer))
    if isinstance(layer, FunctionalBatchNorm) or type(layer) is nn.GroupNorm or type(layer) is nn.PReLU:
        return Affine(weight, bias, (layer.weight.numel(),), channel=True)
    if type(layer) is nn.LayerNorm:
        return Affine(weight, bias, tuple(layer.normalized_shape), channel=False)
    return None


def _slides_plainly(layer: nn.modules.conv._ConvNd) -> bool:
    """Whether it is one of PyTorch's own convolutions, padded with zeros by numbers."""
    return type(layer) in CONVOLUTIONS and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _sliding(layer: nn.modules.conv._ConvNd) -> Sliding:
    return Sliding(
        stride=tuple(layer.stride),
        padding=tuple(int(size) for size in layer.padding),
        dilation=tuple(layer.dilation),
        transposed=layer.transposed,
        output_padding=tuple(layer.output_padding),
        groups=layer.groups,
    )


def _recorder(layer: Layer, calls: list[Call]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(Call(layer, inputs[0], output))

    return record


class LinearMap(torch.autograd.Function):
    """A linear map and its adjoint, each other's derivative: a second derivative costs no more than the map."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """there(values)."""
        ctx.maps = (there, back)
        return there(values)

    @staticmethod
    def backward(ctx: Any, *derivatives: Tensor) -> tuple[Tensor, None, None]:
        """back(derivative), itself a linear map."""
        there, back = ctx.maps
        return apply_linear(derivatives[0], back, there), None, None


def apply_linear(values: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    """there(values), with `back` as its adjoint."""
    result: Tensor = LinearMap.apply(values, there, back)  # type: ignore[no-untyped-call]
    return result


class OwnConvolution(nn.Module):
    """A convolution with a constant weight; PyTorch's own would compute second derivatives in the weight, too."""

    def __init__(self, source: nn.modules.conv._ConvNd, layer: Convolution | None, calls: list[Call]) -> None:
        super().__init__()
        self.layer = layer
        self.calls = calls
        self.weight, self.bias = source.weight.detach(), None if source.bias is None else source.bias.detach()
        self.sliding = _sliding(source)

    def forward(self, values: Tensor) -> Tensor:
        """Outputs (A * K, channels, *spatial)."""
        placeholder = values.detach()

        def there(one: Tensor) -> Tensor:
            return self.sliding.apply(one, self.weight)

        def back(one: Tensor) -> Tensor:
            return self.sliding.backward(one, placeholder, self.weight, of_input=True)

        output = apply_linear(values, there, back)
        if self.bias is not None:
            output = output + self.bias.view(1, -1, *(1 for _ in output.shape[2:]))
        if self.layer is not None:
            self.calls.append(Call(self.layer, values, output))
        return output


class CandidateNorm(nn.Module):
    """Batch norm with running statistics, or with statistics of every candidate's own images."""

    def __init__(
        self, source: FunctionalBatchNorm, examples: int, train: bool, affine: Affine | None, calls: list[Call]
    ) -> None:
        super().__init__()
        self.examples = examples
        self.affine = affine
        self.calls = calls
        self.record: Callable[[tuple[Tensor, Tensor]], None] | None = None
        self.eps = source.eps
        self.weight, self.bias = source.weight, source.bias
        self.running = None
        if not train and source.running_mean is not None and source.running_var is not None:
            scale = torch.rsqrt(source.running_var + self.eps)
            self.running = (scale, -source.running_mean * scale)

    def forward(self, values: Tensor) -> Tensor:
        """Normalized values (A * K, C, *spatial)."""
        shape = [1, -1] + [1] * (values.dim() - 2)
        grouped = values.reshape(-1, self.examples, *values.shape[1:])
        if self.running is None or self.record is not None:
            axes = [1, *range(3, grouped.dim())]
            variance, mean = torch.var_mean(grouped, dim=axes, correction=0, keepdim=True)
            if self.record is not None:
                self.record((mean.flatten(1), variance.flatten(1)))
        if self.running is not None:
            scale, shift = (tensor.view(shape) for tensor in self.running)
            normalized = torch.addcmul(shift, values, scale)
        else:
            normalized = ((grouped - mean) * torch.rsqrt(variance + self.eps)).reshape(values.shape)
        if self.weight is None:
            return normalized
        output = torch.addcmul(self.bias.view(shape), normalized, self.weight.view(shape))
        if self.affine is not None:
            self.calls.append(Call(self.affine, normalized, output))
        return output


class OwnNorm(nn.Module):
    """Group or layer norm as a normalization and an affine map behind it."""

    def __init__(self, source: nn.GroupNorm | nn.LayerNorm, affine: Layer, calls: list[Call]) -> None:
        super().__init__()
        self.source = source
        self.affine = affine
        self.calls = calls

    def forward(self, values: Tensor) -> Tensor:
        """Normalized values of the same shape."""
        source = self.source
        if isinstance(source, nn.GroupNorm):
            normalized = F.group_norm(values, source.num_groups, eps=source.eps)
            shape = (1, -1, *(1 for _ in values.shape[2:]))
        else:
            normalized = F.layer_norm(values, source.normalized_shape, eps=source.eps)
            shape = tuple(source.normalized_shape)
        output = normalized * source.weight.view(shape)
        if source.bias is not None:
            output = output + source.bias.view(shape)
        self.calls.append(Call(self.affine, normalized, output))
        return output


class OwnPReLU(nn.Module):
    """PReLU as ReLU plus an affine map of the negative part."""

    def __init__(self, weight: Tensor, affine: Layer, calls: list[Call]) -> None:
        super().__init__()
        self.affine = affine
        self.calls = calls
        self.weight = weight.detach()

    def forward(self, values: Tensor) -> Tensor:
        """Values of the same shape."""
        negative = values.clamp_max(0.0)
        slope = self.weight.view(-1, *(1 for _ in values.shape[2:]))
        output = torch.relu(values) + negative * slope
        self.calls.append(Call(self.affine, negative, output))
        return output

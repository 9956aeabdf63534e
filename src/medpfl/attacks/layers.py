"""Finds the dense layers that closed forms read, and runs a model up to the input of one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from medpfl.core.domain import GlobalModel, Tensors


@dataclass(frozen=True)
class DenseLayer:
    """A dense layer by the names of its trainable tensors; `bias` is None where it has none.

    module: the layer's path inside the model. weight: (units, inputs). bias: (units,).
    """

    module: str
    weight: str
    bias: str | None


def last_dense(model: GlobalModel) -> DenseLayer | str:
    """The classification layer: the last two-dimensional trainable tensor and its module's bias, or why there is none.

    The tensor must have one row per class.
    """
    names = [name for name, tensor in model.parameters.items() if tensor.ndim == 2]
    if not names:
        return "the model has no dense layer"
    layer = dense_layer(model, names[-1])
    rows, classes = int(model.parameters[layer.weight].shape[0]), model.task.classes
    if rows != classes:
        return f"the last dense layer '{layer.module}' has {rows} rows, not one per class ({classes})"
    later = list(model.parameters)[list(model.parameters).index(layer.weight) + 1 :]
    others = [name for name in later if name != layer.bias]
    if others:
        return f"trainable tensors ({others[0]}) come after the last dense layer '{layer.module}'"
    return layer


def first_dense(model: GlobalModel) -> DenseLayer | str:
    """The first trainable layer if it is dense and has a bias, or why it is not."""
    name = next(iter(model.parameters), None)
    if name is None:
        return "the model has no trainable tensors"
    if model.parameters[name].ndim != 2:
        kind = "convolution or other" if model.parameters[name].ndim > 2 else "normalization or other"
        return f"the first trainable layer is no dense layer ('{name}' belongs to a {kind} layer)"
    layer = dense_layer(model, name)
    if layer.bias is None:
        return f"the first dense layer '{layer.module}' has no bias, so nothing can be divided by its gradient"
    return layer


def layer_input(
    model: GlobalModel,
    layer: DenseLayer,
    images: Tensor,
    *,
    parameters: Tensors | None = None,
    buffers: Tensors | None = None,
    batch_norm: Literal["train", "eval"] = "eval",
) -> Tensor:
    """What the dense layer receives for images (N, C, *spatial): (N, inputs), differentiable in the images.

    Raises ValueError if the layer is not called exactly once, on one vector per image.
    """
    seen: list[Tensor] = []
    module = model.module.get_submodule(layer.module)

    def keep(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0])

    handle = module.register_forward_pre_hook(keep)
    try:
        model.forward(images, parameters=parameters, buffers=buffers, batch_norm=batch_norm)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].ndim != 2:
        raise ValueError(f"layer '{layer.module}' is not called once on one vector per image")
    return seen[0]


def why_no_single_input(model: GlobalModel, layer: DenseLayer) -> str | None:
    """The reason why `layer` does not see one vector per image; None if it does."""
    dtype = model.parameters[layer.weight].dtype
    try:
        with torch.no_grad():
            layer_input(model, layer, torch.full((2, *model.image_shape), 0.5, dtype=dtype, device=model.device))
    except ValueError as error:
        return str(error)
    return None


def pixel_map(model: GlobalModel, layer: DenseLayer) -> tuple[Tensor, Tensor] | str:
    """The layer's input as shift + factor * pixel, entry by entry (inputs,) each, or why it is no such map.

    Found by running the model on a black, a white and a random image, so any normalization in front is undone.
    """
    double = model.to(torch.float64)
    generator = torch.Generator().manual_seed(0)
    black = torch.zeros((1, *model.image_shape), dtype=torch.float64)
    random = torch.rand(black.shape, generator=generator, dtype=torch.float64)
    try:
        with torch.no_grad():
            seen = layer_input(double, layer, torch.cat([black, black + 1.0, random]))
    except (ValueError, RuntimeError) as error:
        return f"what the first dense layer sees cannot be computed: {error}"
    if seen.shape[1] != black.numel():
        return f"the first dense layer '{layer.module}' has {seen.shape[1]} inputs for {black.numel()} pixels"
    shift, factor = seen[0], seen[1] - seen[0]
    predicted = shift + factor * random.reshape(-1)
    if not bool((factor.abs() > 1e-12).all()) or not torch.allclose(predicted, seen[2], rtol=1e-9, atol=1e-12):
        return f"the first dense layer '{layer.module}' does not see the pixels themselves"
    return shift, factor


def dense_layer(model: GlobalModel, weight: str) -> DenseLayer:
    """The dense layer whose weights have this name, with its bias where it has one."""
    module = weight.rpartition(".")[0]
    bias = f"{module}.bias" if module else "bias"
    tensor = model.parameters.get(bias)
    fits = tensor is not None and tensor.shape == model.parameters[weight].shape[:1]
    return DenseLayer(module, weight, bias if fits else None)

"""Patch embeddings: where a vision transformer turns patches into tokens, and which tensor holds its positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from medpfl.core.domain import GlobalModel
from medpfl.models.inspection import VALIDATORS, Finding, Inspection
from medpfl.models.probe import Layer, Probe, probe

MOST_EXTRA_TOKENS = 8
"""A position embedding has at most this many rows more than there are patches (class and register tokens)."""


@dataclass(frozen=True)
class PatchEmbedding:
    """The layer that maps every patch (P numbers) to a token (width numbers), by its path inside the model.

    patches: number of patches of one image. positions: names of trainable tensors (..., rows, width) that could be
    added to the tokens, with at least one row per patch.
    """

    module: str
    weight: str
    bias: str | None
    patches: int
    width: int
    positions: tuple[str, ...]


def find_patch_embedding(model: GlobalModel, seen: Probe | None = None) -> PatchEmbedding | str:
    """The patch embedding of a vision transformer, or half a sentence that says why there is none.

    It is the first convolution whose kernel is its stride, or the first dense layer on (images, patches, numbers).
    Its own tensors may be frozen; position tensors must be trained, else no update has them.
    """
    layers = (seen or probe(model.to(torch.float32))).layers
    layer = next((one for one in layers if isinstance(one.module, nn.Linear | nn.modules.conv._ConvNd)), None)
    if layer is None or (patches := _patches(layer)) is None:
        return "the first layer does not cut images into patches"
    prefix = f"{layer.path}." if layer.path else ""
    width = int(layer.module.get_parameter("weight").shape[0])
    weights = {
        f"{path}.weight"
        for path, module in model.module.named_modules()
        if isinstance(module, nn.Linear | nn.LayerNorm)
    }
    positions = tuple(
        name
        for name, tensor in model.parameters.items()
        if name not in weights
        and tensor.ndim >= 2
        and tensor.shape[-1] == width
        and patches <= tensor.shape[-2] <= patches + MOST_EXTRA_TOKENS
        and tensor.numel() == tensor.shape[-2] * width
    )
    if not positions:
        return f"no trained tensor holds positions of the {patches} patches that '{layer.path}' embeds"
    bias = f"{prefix}bias" if layer.module.bias is not None else None
    return PatchEmbedding(layer.path, f"{prefix}weight", bias, patches, width, positions)


def _patches(layer: Layer) -> int | None:
    """How many patches a layer embeds; None if it embeds none."""
    module = layer.module
    if isinstance(module, nn.Linear):
        return layer.input_shape[1] if len(layer.input_shape) == 3 and layer.input_shape[1] > 1 else None
    assert isinstance(module, nn.modules.conv._ConvNd)
    plain = module.groups == 1 and set(module.dilation) == {1} and not any(map(_positive, module.padding))
    if not plain or module.kernel_size != module.stride or len(layer.input_shape) != len(module.kernel_size) + 2:
        return None
    patches = 1
    for side, kernel in zip(layer.input_shape[2:], module.kernel_size, strict=True):
        patches *= side // kernel
    return patches if patches > 1 else None


def _positive(padding: int | str) -> bool:
    return padding not in (0, "valid")


@VALIDATORS.register("patch_embedding", summary="a trained position embedding leaks the patches of one image exactly")
def patch_embedding(inspection: Inspection) -> Iterator[Finding]:
    """The position embedding's gradient is the gradient in the tokens."""
    found = find_patch_embedding(inspection.model, inspection.probe)
    if isinstance(found, str) or found.weight not in inspection.model.parameters:
        return
    yield Finding(
        "patch_embedding",
        "warning",
        f"the position embedding '{found.positions[0]}' is trained: for one image its gradient and that of "
        f"'{found.module}' give all {found.patches} patches in closed form (april), whatever comes after them; judge "
        "this model by april, and by clients that freeze the position embedding",
    )

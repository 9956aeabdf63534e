"""Linear systems that hold the tokens of a vision transformer: found, tried on a random image, and solved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from medpfl.core.domain import GlobalModel, Tensors
from medpfl.models.patches import PatchEmbedding, find_patch_embedding

Source = Literal["patch_embedding", "attention"]

READ_BACK = 1e-3
"""Root mean square pixel error below which the attacker's own random image counts as read back."""


@dataclass(frozen=True)
class Pixels:
    """What the patch embedding sees: patches (T, P) = shift + factor * image.flatten()[order], entry by entry."""

    order: Tensor
    shift: Tensor
    factor: Tensor

    def image(self, patches: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The image (C, *spatial) that has these patches (T, P)."""
        flat = torch.empty(self.order.numel(), dtype=patches.dtype)
        flat[self.order.reshape(-1)] = ((patches - self.shift) / self.factor).reshape(-1)
        return flat.reshape(shape)


@dataclass(frozen=True)
class Read:
    """An image (C, *spatial), the share of the right-hand side that it leaves unexplained, and the system's rank."""

    image: Tensor
    residual: float
    rank: int


@dataclass(frozen=True)
class Reading:
    """A way from an update to the image.

    positions: the position embedding's name. first: its first row that belongs to a patch. attention: names of the
    first query, key and value weights, empty where the patch embedding's own weight is read.
    """

    source: Source
    embedding: PatchEmbedding
    positions: str
    first: int
    pixels: Pixels
    attention: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Unknown vectors of the linear system."""
        return self.embedding.patches

    def read(self, model: GlobalModel, gradients: Tensors, smallest: float) -> Read:
        """Solves for the patches, with what is not determined at mid-grey. All in float64."""
        rows = gradients[self.positions].double().reshape(-1, self.embedding.width)
        grey = self.pixels.shift + 0.5 * self.pixels.factor
        if self.source == "patch_embedding":
            taken = rows[self.first : self.first + self.tokens]
            right = gradients[self.embedding.weight].double().flatten(1)
            patches, residual, rank = _solve(taken, right, grey, smallest)
            return Read(self.pixels.image(patches, model.image_shape), residual, rank)
        parameters = {name: tensor.double() for name, tensor in model.parameters.items()}
        constants = {name: tensor.double() for name, tensor in model.constants.items()}
        everything = {**constants, **parameters}
        weight = everything[self.embedding.weight].flatten(1)
        bias = everything[self.embedding.bias] if self.embedding.bias else weight.new_zeros(len(weight))
        positions = parameters[self.positions].reshape(-1, self.embedding.width)
        start = positions.clone()
        chosen = slice(self.first, self.first + self.tokens)
        start[chosen] += grey @ weight.T + bias
        right = torch.stack([parameters[name].T @ gradients[name].double() for name in self.attention]).sum(dim=0)
        tokens, residual, rank = _solve(rows, right, start, smallest)
        embedded = (tokens - positions)[chosen] - bias
        patches = torch.linalg.lstsq(weight, embedded.T, driver="gelsd").solution.T
        return Read(self.pixels.image(patches, model.image_shape), residual, min(rank, self.tokens))


def find_reading(model: GlobalModel, sources: tuple[Source, ...], smallest: float) -> Reading | str:
    """The first way that reads a random image of the attacker's own back, or why none does.

    What is assumed of the model (that the positions are added to the tokens in this order, that nothing else reaches
    the weights) is thereby tried and not guessed from names.
    """
    embedding = find_patch_embedding(model)
    if isinstance(embedding, str):
        return embedding
    double = model.to(torch.float64)
    pixels = _pixels(double, embedding)
    if isinstance(pixels, str):
        return pixels
    image = torch.rand((1, *model.image_shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = _gradients(double, image)
    reasons: list[str] = []
    for source in sources:
        for positions in embedding.positions:
            rows = model.parameters[positions].shape[-2]
            for first in range(rows - embedding.patches, -1, -1):
                found = _built(model, source, embedding, positions, first, pixels)
                if isinstance(found, str):
                    reasons.append(found)
                    continue
                read = found.read(double, gradients, min(smallest, 1e-12))
                if float((read.image - image[0]).square().mean().sqrt()) <= READ_BACK:
                    return found
                reasons.append(_why_unread(found, read))
    return reasons[0]


def _built(
    model: GlobalModel, source: Source, embedding: PatchEmbedding, positions: str, first: int, pixels: Pixels
) -> Reading | str:
    if source == "patch_embedding":
        if embedding.weight not in model.parameters:
            return f"the patch embedding '{embedding.module}' is frozen, so no update has its gradient"
        return Reading(source, embedding, positions, first, pixels)
    attention = _first_attention(model, embedding.width)
    if not attention:
        return f"no trained query, key and value weights read tokens of width {embedding.width}"
    if embedding.width < pixels.order.shape[1]:
        return (
            f"tokens of width {embedding.width} do not determine patches of {pixels.order.shape[1]} numbers, so the "
            "patch embedding cannot be inverted"
        )
    return Reading(source, embedding, positions, first, pixels, attention)


def _why_unread(reading: Reading, read: Read) -> str:
    if read.rank < reading.tokens:
        return (
            f"the gradient of the position embedding '{reading.positions}' has rank {read.rank} for {reading.tokens} "
            "patches, so they are not determined"
        )
    if reading.source == "attention":
        return (
            "the first attention is not the only path from the tokens (a norm or a shortcut lies in front), so its "
            "weights do not give them"
        )
    return f"the gradient of '{reading.positions}' is not that of the tokens, so the patches do not come back"


def _first_attention(model: GlobalModel, width: int) -> tuple[str, ...]:
    """The first weight of shape (3 width, width), or the first three of shape (width, width)."""
    square: list[str] = []
    for name, tensor in model.parameters.items():
        if tuple(tensor.shape) == (3 * width, width):
            return (name,)
        if tuple(tensor.shape) == (width, width):
            square.append(name)
        if len(square) == 3:
            return tuple(square)
    return ()


def _solve(rows: Tensor, right: Tensor, start: Tensor, smallest: float) -> tuple[Tensor, float, int]:
    """X (T, P) with rows' X = right, nearest to `start`: rows (T, width), right (width, P). Residual share, rank."""
    left, values, turned = torch.linalg.svd(rows.T, full_matrices=False)
    kept = values > smallest * values[0]
    lacking = right - rows.T @ start
    inverse = torch.where(kept, 1.0 / values, 0.0)
    solution = start + turned.T @ (inverse[:, None] * (left.T @ lacking))
    missed = (right - rows.T @ solution).square().sum() / right.square().sum().clamp_min(1e-300)
    return solution, float(missed), int(kept.sum())


def _gradients(model: GlobalModel, image: Tensor) -> Tensors:
    """What a client with this image and the first class (in every pixel, for segmentation) would send."""
    target = torch.zeros((1, *model.task.output_shape(model.image_shape)), dtype=torch.float64)
    target[0, 0] = 1.0

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return model.task.loss(model.forward(image, parameters=parameters)[0], target)

    gradients: Tensors = torch.func.grad(loss)(dict(model.parameters))
    return gradients


def _pixels(model: GlobalModel, embedding: PatchEmbedding) -> Pixels | str:
    """Found by running a black, a white, a numbered and a random image; normalization in front is thereby undone."""
    count = torch.Size(model.image_shape).numel()
    numbered = torch.arange(count, dtype=torch.float64) / max(1, count - 1)
    random = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = torch.stack([torch.zeros(count).double(), torch.ones(count).double(), numbered, random])
    seen = _patches(model, embedding, images.reshape(4, *model.image_shape))
    if seen is None or seen[0].numel() != count:
        return f"what '{embedding.module}' sees are no patches that cover every pixel once"
    shift, factor = seen[0], seen[1] - seen[0]
    if not bool((factor.abs() > 1e-12).all()):
        return f"'{embedding.module}' does not see the pixels themselves"
    order = ((seen[2] - shift) / factor * (count - 1)).round().long().clamp(0, count - 1)
    if not torch.allclose(shift + factor * random[order], seen[3], rtol=1e-9, atol=1e-12):
        return f"'{embedding.module}' does not see the pixels themselves"
    return Pixels(order, shift, factor)


def _patches(model: GlobalModel, embedding: PatchEmbedding, images: Tensor) -> Tensor | None:
    """What the patch embedding multiplies its weights with: (N, patches, numbers)."""
    kept: list[Tensor] = []
    module = model.module.get_submodule(embedding.module)
    handle = module.register_forward_pre_hook(lambda _module, arguments: kept.append(arguments[0].detach()))
    try:
        with torch.no_grad():
            model.forward(images)
    finally:
        handle.remove()
    if len(kept) != 1:
        return None
    if isinstance(module, nn.Linear):
        return kept[0]
    assert isinstance(module, nn.modules.conv._ConvNd)
    cut = kept[0]
    for axis, kernel in enumerate(module.kernel_size, start=2):
        cut = cut.unfold(axis, kernel, kernel)
    dimensions = len(module.kernel_size)
    places = tuple(range(2, 2 + dimensions))
    inside = tuple(range(2 + dimensions, 2 + 2 * dimensions))
    return cut.permute(0, *places, 1, *inside).flatten(1 + dimensions).flatten(1, dimensions)

"""What the layers of a model get and give back for a client's own images: their inputs, and their outputs' gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from medpfl.core.domain import Batch, GlobalModel

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class LayerView:
    """A dense layer or a convolution as a matrix that is applied to samples: to one vector per image, token or patch.

    path: where it is in the model. weight, bias: names of its trainable tensors; bias None without one.
    calls: for every time that it is called a view (*places, *sample) of its input, where places are (N, *positions).
    errors: (units, S) gradients of the mean loss by its outputs for the S samples of all calls, so that
    dL/dW = errors @ samples and dL/db = errors.sum(1).
    images: how many images the samples come from. convolution: whether samples are patches of what it gets.
    """

    path: str
    weight: str
    bias: str | None
    calls: tuple[tuple[Tensor, int], ...]
    errors: Tensor
    images: int
    convolution: bool

    @property
    def units(self) -> int:
        """Rows of its weight."""
        return int(self.errors.shape[0])

    @property
    def count(self) -> int:
        """Samples, S."""
        return int(self.errors.shape[1])

    @property
    def inputs(self) -> int:
        """Entries of one sample, D."""
        view, places = self.calls[0]
        return math.prod(view.shape[places:])

    @property
    def owners(self) -> Tensor:
        """The image that each sample comes from, (S,)."""
        found = []
        for view, places in self.calls:
            count = math.prod(view.shape[:places])
            found.append(torch.arange(count) * self.images // count)
        return torch.cat(found)

    def samples(self, chosen: Tensor | None = None) -> Tensor:
        """Its samples (S, D), or those at the chosen places in this order; only these are copied."""
        if chosen is None:
            return torch.cat([view.reshape(math.prod(view.shape[:places]), -1) for view, places in self.calls])
        result, start = torch.zeros(len(chosen), self.inputs, dtype=self.errors.dtype, device=self.errors.device), 0
        for view, places in self.calls:
            count = math.prod(view.shape[:places])
            here = ((chosen >= start) & (chosen < start + count)).nonzero().flatten()
            where = torch.unravel_index(chosen[here] - start, view.shape[:places])
            result[here] = view[where].reshape(len(here), -1)
            start += count
        return result

    def mean(self) -> Tensor:
        """The mean sample (D,), computed without copying them."""
        sums = [view.sum(dim=tuple(range(places))).reshape(-1) for view, places in self.calls]
        return torch.stack(sums).sum(dim=0) / self.count

    def squares(self) -> Tensor:
        """The squared length of every sample, (S,), computed without copying them."""
        return torch.cat([_square_lengths(view, places) for view, places in self.calls])


def layer_views(
    model: GlobalModel, batch: Batch, batch_norm: Literal["train", "eval"] = "eval"
) -> tuple[list[LayerView], dict[str, str]]:
    """All dense layers and convolutions with trainable weights, and why others with such weights cannot be looked at.

    One forward and one backward pass of the whole batch, in the precision of the model's tensors.
    """
    layers = {path: layer for path, layer in model.module.named_modules() if _is_matrix(layer, path, model)}
    calls, output = _run(model, layers, batch.images.to(_dtype(model)), batch_norm)
    loss = model.task.loss(output, batch.targets)
    outputs = [(path, out) for path, made in calls.items() for _, out in made]
    gradients = torch.autograd.grad(loss, [out for _, out in outputs], allow_unused=True) if outputs else ()
    errors: dict[str, list[Tensor]] = {}
    for (path, out), gradient in zip(outputs, gradients, strict=True):
        given = torch.zeros_like(out) if gradient is None else gradient
        moved = given.movedim(1, -1) if isinstance(layers[path], Convolution) else given
        errors.setdefault(path, []).append(moved.reshape(-1, moved.shape[-1]).T)
    views: list[LayerView] = []
    not_covered = dict.fromkeys(_matrices(model), "its layer is neither dense nor a convolution")
    for path, layer in layers.items():
        weight = _name(path, "weight")
        if path not in calls:
            not_covered[weight] = "its layer was not called"
        elif (reason := _why_no_matrix(layer)) is not None:
            not_covered[weight] = reason
        else:
            not_covered.pop(weight, None)
            bias = _name(path, "bias")
            views.append(
                LayerView(
                    path=path,
                    weight=weight,
                    bias=bias if bias in model.parameters else None,
                    calls=tuple(sample_view(layer, received) for received, _ in calls[path]),
                    errors=torch.cat(errors[path], dim=1).detach(),
                    images=len(batch),
                    convolution=isinstance(layer, Convolution),
                )
            )
    return views, not_covered


def pixel_maps(model: GlobalModel) -> dict[str, tuple[Tensor, Tensor]]:
    """For layers that see the image itself, or patches of it: a sample as shift + factor * pixels, (D,) each.

    Found by running the model on a black, a white and a random image, so any normalization in front is undone. A layer
    that shuffles pixels, mixes them, or pads patches is not among them.
    """
    layers = {path: layer for path, layer in model.module.named_modules() if _is_matrix(layer, path, model)}
    generator = torch.Generator().manual_seed(0)
    black = torch.zeros((1, *model.image_shape))
    random = torch.rand(black.shape, generator=generator)
    probes = torch.cat([black, black + 1.0, random]).to(model.device, _dtype(model))
    with torch.no_grad():
        calls, _ = _run(model, layers, probes, "eval")
    found = {}
    for path, made in calls.items():
        received = made[0][0]
        if len(made) != 1 or received[0].numel() != probes[0].numel() or len(received) != len(probes):
            continue
        seen, pixels = received.double().flatten(1), probes.double().flatten(1)
        shift, factor = seen[0], seen[1] - seen[0]
        if not bool((factor.abs() > 1e-6).all()) or not torch.allclose(
            shift + factor * pixels[2], seen[2], rtol=1e-4, atol=1e-5
        ):
            continue
        both = torch.stack([shift, factor]).reshape(2, *received.shape[1:])
        view, places = sample_view(layers[path], both)
        rows = view.reshape(2, math.prod(view.shape[1:places]), -1)
        if torch.allclose(rows, rows[:, :1].expand_as(rows)):
            found[path] = (rows[0, 0].to(seen.dtype), rows[1, 0].to(seen.dtype))
    return found


def mixed_images(model: GlobalModel) -> frozenset[str]:
    """Dense layers that see the whole image through a linear map that mixes pixels, such as a convolution alone.

    Whoever made the map undoes it, so what such a layer gives back are images. Found by running the model on two
    random images and their mean.
    """
    layers = {path: layer for path, layer in model.module.named_modules() if _is_matrix(layer, path, model)}
    probes = torch.rand((3, *model.image_shape), generator=torch.Generator().manual_seed(0))
    probes[2] = (probes[0] + probes[1]) / 2
    with torch.no_grad():
        calls, _ = _run(model, layers, probes.to(model.device, _dtype(model)), "eval")
    found = set()
    for path, made in calls.items():
        received = made[0][0]
        if len(made) != 1 or isinstance(layers[path], Convolution) or received.ndim != 2:
            continue
        first, second, mean = received.double()
        differ = float((first - second).norm())
        enough = len(mean) >= LEAST_OF_IMAGE * probes[0].numel()
        if enough and differ > 0 and float(((first + second) / 2 - mean).norm()) < 1e-4 * differ:
            found.add(path)
    return frozenset(found)


LEAST_OF_IMAGE = 0.25
"""A layer that gets fewer numbers than this share of the image's entries does not see the whole image."""


def sample_view(layer: nn.Module, received: Tensor) -> tuple[Tensor, int]:
    """A layer's input as (N, *positions, *sample), and how many of the dimensions are places of samples."""
    if not isinstance(layer, Convolution):
        return received, received.ndim - 1
    dimensions = len(layer.kernel_size)
    padding = layer.padding if not isinstance(layer.padding, str) else _same_padding(layer)
    ends = [size for pair in reversed([_both(one) for one in padding]) for size in pair]
    patches = nn.functional.pad(received, ends) if any(ends) else received
    for axis in range(dimensions):
        patches = patches.unfold(2 + axis, layer.kernel_size[axis], layer.stride[axis])
    positions = range(2, 2 + dimensions)
    kernel = range(2 + dimensions, 2 + 2 * dimensions)
    return patches.permute(0, *positions, 1, *kernel), 1 + dimensions


Calls = dict[str, list[tuple[Tensor, Tensor]]]


def _run(
    model: GlobalModel, layers: dict[str, nn.Module], images: Tensor, batch_norm: Literal["train", "eval"]
) -> tuple[Calls, Tensor]:
    """What every layer received (without history) and gave, call by call, and the model's output."""
    calls: Calls = {}

    def keep(path: str) -> object:
        def hook(_layer: nn.Module, arguments: Sequence[Tensor], output: Tensor) -> Tensor:
            calls.setdefault(path, []).append((arguments[0].detach().clone(), output))
            return output.clone()  # what comes behind may change its input in place

        return hook

    handles = [layer.register_forward_hook(keep(path)) for path, layer in layers.items()]  # type: ignore[arg-type]
    parameters = {name: tensor.detach().requires_grad_() for name, tensor in model.parameters.items()}
    try:
        output, _ = model.forward(images, parameters=parameters, batch_norm=batch_norm)
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def _is_matrix(layer: nn.Module, path: str, model: GlobalModel) -> bool:
    return isinstance(layer, nn.Linear | Convolution) and _name(path, "weight") in model.parameters


def _matrices(model: GlobalModel) -> list[str]:
    """Names of trainable tensors that could hold samples as rows."""
    return [name for name, tensor in model.parameters.items() if tensor.ndim >= 2]


def _why_no_matrix(layer: nn.Module) -> str | None:
    if isinstance(layer, Convolution):
        if layer.groups != 1:
            return "its convolution is grouped"
        if any(size != 1 for size in layer.dilation):
            return "its convolution is dilated"
        if layer.padding_mode != "zeros":
            return f"its convolution pads with '{layer.padding_mode}'"
    return None


def _square_lengths(view: Tensor, places: int) -> Tensor:
    found = torch.einsum(view, list(range(view.ndim)), view, list(range(view.ndim)), list(range(places)))
    return found.reshape(-1)


def _same_padding(layer: Convolution) -> list[tuple[int, int]]:
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    return [((size - 1) // 2, size - 1 - (size - 1) // 2) for size in layer.kernel_size]


def _both(one: int | tuple[int, int]) -> tuple[int, int]:
    return one if isinstance(one, tuple) else (one, one)


def _dtype(model: GlobalModel) -> torch.dtype:
    return next(iter(model.parameters.values())).dtype


def _name(path: str, tensor: str) -> str:
    return f"{path}.{tensor}" if path else tensor

"""Images from what is left of them behind a convolution and ReLU: linear equations on the entries above zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from medpfl.attacks.latent_bins import HiddenLayer, latents, random_images
from medpfl.core.domain import GlobalModel

PROBES = 6
"""Random images, some of them far outside [0, 1], that tell which entry behind the network is which before."""

SAME = 1e-6
"""Entries that differ by less on all probes, as shares of the largest one, are the same: buffers are sent in float32."""

BLOCK = 8
"""Side of the blocks whose cosine coefficients are taken to be few, as in JPEG."""

MOST_DENSE = 4096
"""Values of an image up to which the equations are written down as a matrix."""

RANK = 1e-10
"""Singular values below this share of the largest one count as zero."""


@dataclass(frozen=True)
class Activations:
    """Latents z = relu(A x + c), entry by entry, where A x + c is what the first convolution gives.

    model: in float64. convolution: path of the module. entries: (F,), which entry of its output each latent is.
    """

    model: GlobalModel
    convolution: str
    entries: Tensor

    def before(self, images: Tensor) -> Tensor:
        """A x + c for images (N, C, *spatial): (N, F), differentiable."""
        return first_output(self.model, self.convolution, images).flatten(1)[:, self.entries]

    @property
    def pixels(self) -> int:
        """Values of one image."""
        return torch.Size(self.model.image_shape).numel()

    def matrix(self) -> tuple[Tensor, Tensor]:
        """A (F, pixels) and c (F,)."""
        black = torch.zeros((1, *self.model.image_shape), dtype=torch.float64)
        offset = self.before(black)[0]
        units = torch.eye(self.pixels, dtype=torch.float64).reshape(-1, *self.model.image_shape)
        rows = [self.before(part) - offset for part in torch.split(units, 256)]
        return torch.cat(rows).T, offset


class _Reached(Exception):
    """The convolution was reached: nothing behind it needs to run."""


def first_output(model: GlobalModel, path: str, images: Tensor) -> Tensor:
    """What the layer at `path` gives for images, without running what comes behind it."""
    found: list[Tensor] = []

    def stop(_module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output)
        raise _Reached

    handle = model.module.get_submodule(path).register_forward_hook(stop)
    try:
        model.forward(images)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def random_front(model: GlobalModel, layer: HiddenLayer, generator: torch.Generator) -> GlobalModel | str:
    """`model` with random filters of norm 1 in its first convolution and nothing but copies up to the dense layer.

    Later convolutions become identities and norms neutral; biases are zero. The reason where the first layer is none.
    """
    names = list(model.parameters)[: list(model.parameters).index(layer.first.weight)]
    if not names or model.parameters[names[0]].ndim != len(model.image_shape) + 1:
        return "the first trainable layer is no convolution"
    crafted = {}
    for name in names:
        tensor = model.parameters[name]
        if name == names[0]:
            filters = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
            values = filters / filters.flatten(1).norm(dim=1).reshape(-1, *[1] * (tensor.ndim - 1))
        elif 3 <= tensor.ndim <= 5:
            values = nn.init.dirac_(torch.zeros(tensor.shape, dtype=torch.float64))
        else:
            values = torch.full(tensor.shape, float(name.endswith("weight")), dtype=torch.float64)
        crafted[name] = values.to(tensor)
    return replace(model, parameters={**model.parameters, **crafted}, buffers=_neutral(model))


def _neutral(model: GlobalModel) -> dict[str, Tensor]:
    """Running statistics under which batch norm changes nothing."""
    values = {name: tensor.clone() for name, tensor in model.buffers.items()}
    for path, module in model.module.named_modules():
        prefix = f"{path}." if path else ""
        if getattr(module, "functional_batch_norm", False) and f"{prefix}running_var" in values:
            values[f"{prefix}running_mean"] = torch.zeros_like(values[f"{prefix}running_mean"])
            values[f"{prefix}running_var"] = torch.full_like(values[f"{prefix}running_var"], 1.0 - float(module.eps))
    return values


def activations(model: GlobalModel, layer: HiddenLayer) -> Activations | str:
    """How the latents follow from the first convolution, or why they do not entry by entry. Tried on random images."""
    model = model.to(torch.float64)
    path = next(iter(model.parameters)).rpartition(".")[0]
    images = random_images(model, PROBES)
    images = torch.cat([images, 4 * images - 2, -images])
    with torch.no_grad():
        before = torch.relu(first_output(model, path, images)).flatten(1)
        behind = latents(model, layer, images)
    weights = torch.rand(len(images), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    keys, order = (weights @ before).sort()
    wanted = weights @ behind
    above = torch.searchsorted(keys, wanted).clamp(1, len(keys) - 1)
    near = torch.where((keys[above] - wanted).abs() < (wanted - keys[above - 1]).abs(), above, above - 1)
    entries = order[near]
    if not bool((before[:, entries] - behind).abs().amax() <= SAME * max(1.0, float(before.amax()))):
        return (
            "what the dense layer sees is more than the first convolution's entries above zero, even if all that lies "
            "between were identities: a pooling, another activation than ReLU, or a layer that mixes entries"
        )
    return Activations(model, path, entries)


def least_squares(system: Activations, seen: Tensor, iterations: int = 500) -> Tensor:
    """Images (N, C, *spatial) that fit latents (N, F) best on entries above zero; of those, the nearest to black.

    Conjugate gradients on the normal equations (CGLS; Bjorck, Numerical Methods for Least Squares Problems, 7.4.1).
    """
    active = seen > 0
    black = torch.zeros((len(seen), *system.model.image_shape), dtype=torch.float64)
    with torch.no_grad():
        offset = system.before(black)

    def forwards(images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.where(active, system.before(images) - offset, 0.0)

    def backwards(entries: Tensor) -> Tensor:
        images = black.clone().requires_grad_()
        (found,) = torch.autograd.grad(system.before(images), images, torch.where(active, entries, 0.0))
        return found

    found, left = black, torch.where(active, seen - offset, 0.0)
    direction = slope = backwards(left)
    size = _squares(slope)
    least = 1e-26 * size
    for _ in range(iterations):
        if bool((size <= least).all()):
            break
        moved = forwards(direction)
        step = size / _squares(moved).clamp_min(1e-300)
        found = found + _each(step, found) * direction
        left = left - _each(step, left) * moved
        slope = backwards(left)
        new = _squares(slope)
        direction = slope + _each(new / size.clamp_min(1e-300), slope) * direction
        size = new
    return found


def sparsest(matrix: Tensor, offset: Tensor, seen: Tensor, shape: tuple[int, ...], iterations: int) -> Tensor:
    """The image (*shape) with the least absolute sum of block cosine coefficients that gives latents (F,) above zero.

    Basis pursuit by the alternating direction method of multipliers (Boyd et al. 2011, section 6.2): in turn onto the
    images that fulfill all equations, and coefficients shrunk towards zero. Black without any equation.
    """
    active = seen > 0
    if not bool(active.any()):
        return torch.zeros(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix[active], full_matrices=False)
    kept = values > RANK * values[0]
    right = right[kept]
    particular = right.T @ ((left[:, kept].T @ (seen - offset)[active]) / values[kept])

    def fulfilling(image: Tensor) -> Tensor:
        onto: Tensor = image - right.T @ (right @ image) + particular
        return onto

    transform, back = block_cosines(shape)
    coefficients = transform(particular)
    threshold = 0.1 * float(coefficients.abs().mean()) + 1e-12
    dual = torch.zeros_like(coefficients)
    image: Tensor = particular
    for _ in range(iterations):
        image = fulfilling(back(coefficients - dual))
        moved = transform(image) + dual
        coefficients = moved.sign() * (moved.abs() - threshold).clamp_min(0)
        dual = moved - coefficients
    return image.reshape(shape)


def block_cosines(shape: tuple[int, ...]) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Orthonormal cosine transform (DCT-II) of blocks of 8 along every spatial axis of flat images, and its inverse.

    A side that 8 does not divide ends with a smaller block.
    """
    bases = [_cosine_blocks(side) for side in shape[1:]]

    def along(flat: Tensor, matrices: list[Tensor]) -> Tensor:
        image = flat.reshape(shape)
        for axis, matrix in enumerate(matrices, start=1):
            image = torch.movedim(torch.tensordot(matrix, image, dims=([1], [axis])), 0, axis)
        return image.reshape(-1)

    return lambda flat: along(flat, bases), lambda flat: along(flat, [basis.T for basis in bases])


def _cosine_blocks(side: int) -> Tensor:
    blocks = [_cosines(min(BLOCK, side - start)) for start in range(0, side, BLOCK)]
    found = torch.zeros(side, side, dtype=torch.float64)
    for place, block in enumerate(blocks):
        here = slice(place * BLOCK, place * BLOCK + len(block))
        found[here, here] = block
    return found


def _cosines(size: int) -> Tensor:
    places = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi / size * (places + 0.5) * places[:, None])
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def _squares(values: Tensor) -> Tensor:
    return values.flatten(1).square().sum(dim=1)


def _each(factors: Tensor, like: Tensor) -> Tensor:
    return factors.reshape(-1, *[1] * (like.ndim - 1))

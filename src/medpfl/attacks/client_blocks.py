"""LOKI's front: a convolution that puts every client's images into a block of its own, and bins behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medpfl.attacks.front import BIAS, SECOND_BIAS, SECOND_WEIGHT, WEIGHT, in_front
from medpfl.core.domain import GlobalModel
from medpfl.models.shapes import CONVOLUTIONS

KERNEL = 3
"""Side of the identity kernels."""

KERNELS, OFFSETS = "front.blocks.weight", "front.blocks.bias"
"""Names of the convolution's tensors."""

BRIGHTEST = 1.05
"""Upper end of the last bin: no mean of values in [0, 1] is as high."""


@dataclass(frozen=True)
class ClientBlocks:
    """A convolution with a block of kernels for every client, and two dense layers that sort images by brightness.

    Client z's kernels copy the image, divided by `scale`, into block z and are zero in all other blocks. With
    `constant` a block has one channel more, which is 1 / scale in client z's own block and 0 elsewhere. Unit k of the
    first dense layer is (brightness - edge_k) / (edge_k+1 - edge_k), cut off at 0 and 1: it gets a gradient from the
    images of bin k only, and this gradient is (error / scale) times the image in its client's block, and times 1 in
    the constant channel. The second dense layer's columns are all equal, gain * direction / K.

    edges: (K,) float64, rising. direction: (D,) of length 1. offset: (D,). scale and gain: above 0.
    """

    image_shape: tuple[int, ...]
    clients: int
    constant: bool
    edges: Tensor
    direction: Tensor
    offset: Tensor
    scale: float
    gain: float

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return self.image_shape[0] + self.constant

    def in_front_of(self, model: GlobalModel) -> GlobalModel:
        """What the first client gets."""
        return self.for_clients(model, 1)[0]

    def for_clients(self, model: GlobalModel, number: int) -> tuple[GlobalModel, ...]:
        """What each of the first clients gets; all share the tensors behind the convolution."""
        front = _Front(self.image_shape, self.clients * self.channels, len(self.edges))
        dense = self._dense()
        return tuple(in_front(model, front, {**self._convolution(client), **dense}) for client in range(number))

    def _convolution(self, client: int) -> dict[str, Tensor]:
        colors, dimensions = self.image_shape[0], len(self.image_shape) - 1
        kernels = torch.zeros(self.clients, self.channels, colors, *[KERNEL] * dimensions)
        offsets = torch.zeros(self.clients, self.channels)
        for color in range(colors):
            kernels[(client, color, color, *[KERNEL // 2] * dimensions)] = 1.0 / self.scale
        if self.constant:
            offsets[client, -1] = 1.0 / self.scale
        device = self.direction.device
        return {KERNELS: kernels.flatten(0, 1).to(device), OFFSETS: offsets.flatten().to(device)}

    def _dense(self) -> dict[str, Tensor]:
        units, inputs = len(self.edges), len(self.direction)
        pixels = inputs // self.image_shape[0]
        widths = ends(self.edges) - self.edges
        rows = torch.zeros(units, self.clients, self.channels, pixels)
        rows[:, :, : self.image_shape[0]] = (self.scale / (inputs * widths)).float()[:, None, None, None]
        tensors = {
            WEIGHT: rows.flatten(1),
            BIAS: (-self.edges / widths).float(),
            SECOND_WEIGHT: (self.gain * self.direction / units).float()[:, None].repeat(1, units),
            SECOND_BIAS: self.offset.float(),
        }
        return {name: tensor.to(self.direction.device) for name, tensor in tensors.items()}


def blocks_parameters(model: GlobalModel, units: int, clients: int, constant: bool) -> int:
    """Trainable entries of the front for so many units and clients."""
    inputs, colors = torch.Size(model.image_shape).numel(), model.image_shape[0]
    channels, pixels = clients * (colors + constant), inputs // colors
    kernels = channels * (colors * KERNEL ** (len(model.image_shape) - 1) + 1)
    return int(kernels + units * channels * pixels + units + units * inputs + inputs)


def block_of(weight: Tensor, client: int, clients: int, image_shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """What the first dense layer's gradient (K, inputs) holds of one client: float64 (K, D), and (K,) or None.

    The second is that of the constant channel where the blocks have one, averaged over its pixels, which all hold the
    same.
    """
    colors, pixels = image_shape[0], torch.Size(image_shape[1:]).numel()
    own = weight.reshape(len(weight), clients, -1, pixels)[:, client].double()
    return own[:, :colors].flatten(1), own[:, colors].mean(dim=1) if own.shape[1] > colors else None


def ends(edges: Tensor) -> Tensor:
    """Where the bins (K,) that begin at the edges end, the last one above all images."""
    return torch.cat([edges[1:], edges.new_tensor([BRIGHTEST])])


class _Front(nn.Module):
    """Image -> one block per client -> brightness bins -> image-shaped output. Its own tensors are never used."""

    def __init__(self, image_shape: tuple[int, ...], channels: int, units: int) -> None:
        super().__init__()
        colors, pixels = image_shape[0], torch.Size(image_shape[1:]).numel()
        convolution = CONVOLUTIONS[len(image_shape) - 1]
        self.blocks = convolution(colors, channels, KERNEL, padding=KERNEL // 2, device="meta")
        self.first = nn.Linear(channels * pixels, units, device="meta")
        self.second = nn.Linear(units, colors * pixels, device="meta")

    def forward(self, images: Tensor) -> Tensor:
        shown = self.blocks(images).flatten(1)
        output: Tensor = self.second(F.hardtanh(self.first(shown), 0.0, 1.0))
        return output.reshape(images.shape)

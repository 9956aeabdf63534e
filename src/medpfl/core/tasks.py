"""What a model is trained for: the loss and the form of its targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Task(Protocol):
    """A task knows its loss. Targets are class indices or class weights, per image or per pixel."""

    @property
    def name(self) -> str:
        """Name in specs and reports."""

    @property
    def classes(self) -> int:
        """Number of outputs of the model, per image or per pixel."""

    def output_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the output for one image (C, *spatial): (classes,), or (classes, *spatial)."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean loss over the batch; output (N, *output_shape), scalar."""

    def encode(self, labels: Tensor) -> Tensor:
        """Labels as float targets of shape (N, *output_shape)."""


@dataclass(frozen=True)
class SingleLabel:
    """One class per image; cross entropy. Targets: int64 (N,), or float (N, classes) whose rows sum to 1.

    >>> SingleLabel(3).encode(torch.tensor([2])).tolist()
    [[0.0, 0.0, 1.0]]
    """

    classes: int
    name: str = "single_label"

    def output_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """One output per class."""
        return (self.classes,)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean cross entropy over the batch."""
        return F.cross_entropy(output, target if not target.is_floating_point() else target.to(output.dtype))

    def encode(self, labels: Tensor) -> Tensor:
        """One-hot rows."""
        return labels if labels.is_floating_point() else F.one_hot(labels, self.classes).to(torch.float32)


@dataclass(frozen=True)
class MultiLabel:
    """Any number of classes per image; binary cross entropy, mean over images and classes. Targets 0/1 (N, classes)."""

    classes: int
    name: str = "multi_label"

    def output_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """One output per class."""
        return (self.classes,)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean binary cross entropy over the batch and the classes."""
        return F.binary_cross_entropy_with_logits(output, target.to(output.dtype))

    def encode(self, labels: Tensor) -> Tensor:
        """Labels as floats."""
        return labels.to(torch.float32)


@dataclass(frozen=True)
class Segmentation:
    """One class per pixel, the first being the background; Dice loss plus cross entropy.

    Targets are masks, int64 (N, *spatial), or class maps, float (N, classes, *spatial), which sum to 1 in every pixel.
    Outputs are scores before softmax. The soft Dice loss (Milletari, Navab, Ahmadi: V-Net, 3DV 2016, section 3, without
    their squares) is, with softmax outputs p and class maps t,

        1 - (2 sum(p t) + smoothing) / (sum(p) + sum(t) + smoothing),

    sums over the pixels of one image, mean over its classes (without the first one unless `background`) and over
    images, so that the loss of a batch is the mean of its images' losses. Cross entropy is the mean over all pixels.

    >>> sure = torch.tensor([[[[50.0, -50.0]], [[-50.0, 50.0]]]])
    >>> round(float(Segmentation(2).loss(sure, torch.tensor([[[0, 1]]]))), 6)
    0.0
    """

    classes: int
    dice: float = 1.0
    cross_entropy: float = 1.0
    smoothing: float = 1e-5
    background: bool = True
    name: str = "segmentation"

    def output_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """One output per class and pixel."""
        return (self.classes, *image_shape[1:])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Weighted sum of the two losses, in float32 at least; twice differentiable in outputs and class maps."""
        output = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
        maps = self.encode(target).to(output.dtype)
        entropy = F.cross_entropy(output, maps)
        first = 0 if self.background else 1
        predicted, true = output.softmax(dim=1)[:, first:].flatten(2), maps[:, first:].flatten(2)
        overlap = (predicted * true).sum(dim=2)
        total = predicted.sum(dim=2) + true.sum(dim=2)
        dice = 1.0 - (2.0 * overlap + self.smoothing) / (total + self.smoothing)
        return self.dice * dice.mean() + self.cross_entropy * entropy

    def encode(self, labels: Tensor) -> Tensor:
        """One-hot class maps."""
        if labels.is_floating_point():
            return labels
        classes = torch.arange(self.classes, device=labels.device).reshape(-1, *(1 for _ in labels.shape[1:]))
        return (labels.unsqueeze(1) == classes).to(torch.float32)

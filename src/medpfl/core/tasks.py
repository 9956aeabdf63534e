"""What a model is trained for: the loss and the form of its targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Task(Protocol):
    """A task knows its loss. Targets are class indices or class weights per image."""

    @property
    def name(self) -> str:
        """Name in specs and reports."""

    @property
    def classes(self) -> int:
        """Number of outputs of the model."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean loss over the batch; output (N, classes), scalar."""

    def encode(self, labels: Tensor) -> Tensor:
        """Labels as float targets of shape (N, classes)."""


@dataclass(frozen=True)
class SingleLabel:
    """One class per image; cross entropy. Targets: int64 (N,), or float (N, classes) whose rows sum to 1.

    >>> SingleLabel(3).encode(torch.tensor([2])).tolist()
    [[0.0, 0.0, 1.0]]
    """

    classes: int
    name: str = "single_label"

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

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean binary cross entropy over the batch and the classes."""
        return F.binary_cross_entropy_with_logits(output, target.to(output.dtype))

    def encode(self, labels: Tensor) -> Tensor:
        """Labels as floats."""
        return labels.to(torch.float32)

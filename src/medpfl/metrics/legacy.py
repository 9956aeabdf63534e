"""SSIM and MSE as the source papers computed them, for reproduction only.

MedPFL's public code scores its attacks with three dynamic ranges, and partly outside [0, 1]. These conventions are
kept apart from every headline number; `medpfl.metrics.METRICS` says why they mislead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from medpfl.core.errors import SpecError, suggestion
from medpfl.core.functional import mse, ssim

Normalization = tuple[Tensor, Tensor]
"""Mean and standard deviation per channel, each (C,)."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def legacy_scores(
    truth: Tensor, reconstruction: Tensor, convention: str, normalization: Normalization | None = None
) -> tuple[Tensor, Tensor]:
    """SSIM and MSE of a paper's convention per image: (N, C, *spatial) twice -> two float64 tensors (N,).

    `reconstruction` is the attack's result before clamping, where it kept that. `normalization` is the model's own
    mean and standard deviation, which only `range_255_normalized` reads. Raises SpecError on an unknown convention.
    """
    if convention not in CONVENTIONS:
        raise SpecError(f"unknown legacy convention '{convention}': {suggestion(convention, CONVENTIONS)}")
    return CONVENTIONS[convention](truth, reconstruction, normalization)


def _range_0(truth: Tensor, reconstruction: Tensor, _: Normalization | None) -> tuple[Tensor, Tensor]:
    """CPL and iDLG: dynamic range 0, so both stabilizers vanish, on images that are not clamped.

    NaN where any window of both images is empty (0/0). Where both are flat, rounding decides the value.
    """
    return ssim(truth, reconstruction, data_range=0.0), mse(truth, reconstruction)


def _range_1(truth: Tensor, reconstruction: Tensor, _: Normalization | None) -> tuple[Tensor, Tensor]:
    """Dynamic range 1 on images that are not clamped: for attacks whose paper is silent."""
    return ssim(truth, reconstruction), mse(truth, reconstruction)


def _range_1_8bit(truth: Tensor, reconstruction: Tensor, _: Normalization | None) -> tuple[Tensor, Tensor]:
    """DLG: dynamic range 1 after the reconstruction went through 8 bits, in which values outside [0, 1] wrap around."""
    rounded = wrap_to_8_bit(reconstruction)
    return ssim(truth, rounded), mse(truth, rounded)


def _range_255_normalized(
    truth: Tensor, reconstruction: Tensor, normalization: Normalization | None
) -> tuple[Tensor, Tensor]:
    """GradInv: dynamic range 255, the library's default, on images normalized by mean and standard deviation.

    ImageNet's numbers for RGB unless the model has its own; any other number of channels takes the mean of the three.
    """
    mean, std = normalization if normalization is not None else imagenet_normalization(truth.shape[1])
    shape = (1, -1) + (1,) * (truth.ndim - 2)
    mean = mean.to(truth.device, torch.float64).reshape(shape)
    std = std.to(truth.device, torch.float64).reshape(shape)
    a, b = (truth.double() - mean) / std, (reconstruction.double() - mean) / std
    return ssim(a, b, data_range=255.0), mse(a, b)


Convention = Callable[[Tensor, Tensor, Normalization | None], tuple[Tensor, Tensor]]

CONVENTIONS: dict[str, Convention] = {
    "range_0": _range_0,
    "range_1": _range_1,
    "range_1_8bit": _range_1_8bit,
    "range_255_normalized": _range_255_normalized,
}
"""The conventions that an attack can name as its `legacy_convention`."""


def wrap_to_8_bit(images: Tensor) -> Tensor:
    """Images through unsigned 8-bit numbers and back: truncated, and wrapped around outside [0, 1].

    >>> (wrap_to_8_bit(torch.tensor([0.5, 1.01, -0.01])) * 255).round().tolist()
    [127.0, 1.0, 254.0]
    """
    counts = torch.fmod(torch.trunc(images * 255).double(), 256.0)
    return torch.where(counts < 0, counts + 256.0, counts) / 255.0


def imagenet_normalization(channels: int) -> Normalization:
    """ImageNet's mean and standard deviation for RGB; for any other number of channels the mean of the three."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    if channels == 3:
        return mean, std
    return mean.mean().expand(channels), std.mean().expand(channels)

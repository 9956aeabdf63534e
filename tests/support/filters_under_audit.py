"""Small privacy filters as platforms have them: right ones, and ones that are broken in ways that were seen in use."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tensors = Mapping[str, Tensor]


def floating(update: Tensors) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in update.items() if tensor.is_floating_point()}


def clipped(update: Tensors, clip: float) -> dict[str, Tensor]:
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in floating(update).values()))
    factor = min(1.0, clip / max(norm, 1e-12))
    return {name: tensor * factor if tensor.is_floating_point() else tensor for name, tensor in update.items()}


def noised(update: Tensors, std: float) -> dict[str, Tensor]:
    return {
        name: tensor + std * torch.randn(tensor.shape).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in update.items()
    }


class ClipAndNoise:
    """Right: one norm over all floating tensors, normal noise in units of it on all of them, bad settings refused."""

    def __init__(self, clip: float = 1.0, noise_multiplier: float = 1.0) -> None:
        if not clip > 0 or not math.isfinite(clip):
            raise ValueError(f"clip must be positive, found {clip}")
        if not noise_multiplier > 0 or not math.isfinite(noise_multiplier):
            raise ValueError(f"noise_multiplier must be positive, found {noise_multiplier}")
        self.clip, self.noise_multiplier = clip, noise_multiplier

    def __call__(self, update: Tensors) -> dict[str, Tensor]:
        return noised(clipped(update, self.clip), self.clip * self.noise_multiplier)


def clip_and_laplace(update: Tensors, clip: float = 1.0, scale: float = 2.0) -> dict[str, Tensor]:
    """Right: bounds the sum of absolute values, adds Laplace noise in units of it; sends no buffers and no counters."""
    if not (clip > 0 and scale > 0):
        raise ValueError("clip and scale must be positive")
    kept = {name: tensor for name, tensor in floating(update).items() if "running" not in name}
    total = sum(float(tensor.double().abs().sum()) for tensor in kept.values())
    factor = min(1.0, clip / max(total, 1e-12))
    law = torch.distributions.Laplace(0.0, clip * scale)
    return {name: tensor * factor + law.sample(tensor.shape).to(tensor.dtype) for name, tensor in kept.items()}


def percentile_clipping(update: Tensors, percentile: float = 10.0, gamma: float = 0.01) -> dict[str, Tensor]:
    """Sold as differential privacy: small entries become zero, large ones are cut, no noise. Fails open."""
    if gamma <= 0 or not 0 <= percentile <= 100:
        return dict(update)
    values = torch.cat([tensor.flatten() for tensor in floating(update).values()]).abs()
    cut = torch.quantile(values, percentile / 100)
    return {
        name: torch.where(tensor.abs() < cut, 0.0, tensor.clamp(-gamma, gamma))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in update.items()
    }


def counter_noise(update: Tensors, share: float = 1e-4) -> dict[str, Tensor]:
    """Calibrates its noise to the largest number in the mapping, which is the batch-norm counter."""
    largest = max(float(tensor.double().abs().max()) for tensor in update.values())
    return noised(clipped(update, 1.0), share * largest)


class ClassicalGaussian:
    """Clips rightly, but takes the noise from the classical formula at any epsilon."""

    def __init__(self, epsilon: float = 10.0, delta: float = 1e-5, clip: float = 1.0) -> None:
        if not epsilon > 0 or not 0 < delta < 1 or not clip > 0:
            raise ValueError("epsilon, delta and clip must be positive")
        self.clip = clip
        self.std = clip * math.sqrt(2 * math.log(1.25 / delta)) / epsilon

    def __call__(self, update: Tensors) -> dict[str, Tensor]:
        return noised(clipped(update, self.clip), self.std)


def other_sensitivity(
    update: Tensors, clip: float = 1.0, sensitivity: float = 1e-4, epsilon: float = 10.0, delta: float = 1e-5
) -> dict[str, Tensor]:
    """Clips at one norm and calibrates its noise to another."""
    return noised(clipped(update, clip), sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon)


def does_nothing(update: Tensors) -> Tensors:
    return update


def noise_without_clipping(update: Tensors, std: float = 0.01) -> dict[str, Tensor]:
    return noised(update, std)


class SameNoise:
    """Draws its noise from a generator that starts anew with every process."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, update: Tensors) -> dict[str, Tensor]:
        return {
            name: tensor + torch.randn(tensor.shape, generator=self.generator) if tensor.is_floating_point() else tensor
            for name, tensor in clipped(update, 1.0).items()
        }


class BudgetThatEnds:
    """Stops filtering when its budget is spent, and says nothing."""

    def __init__(self, calls: int = 5) -> None:
        self.left = calls

    def __call__(self, update: Tensors) -> Tensors:
        self.left -= 1
        return noised(clipped(update, 1.0), 1.0) if self.left >= 0 else update


def arrays(update: Mapping[str, NDArray[np.float32]], clip: float = 1.0) -> dict[str, NDArray[np.float32]]:
    """Right, for NumPy arrays, with noise from the operating system."""
    if not clip > 0:
        raise ValueError("clip must be positive")
    draws = np.random.default_rng()
    kept = {name: array for name, array in update.items() if array.dtype.kind == "f" and "running" not in name}
    norm = math.sqrt(sum(float((array.astype(float) ** 2).sum()) for array in kept.values()))
    factor = min(1.0, clip / max(norm, 1e-12))
    return {
        name: (array * factor + clip * draws.standard_normal(array.shape)).astype(np.float32)
        for name, array in kept.items()
    }


def signs(update: Tensors) -> dict[str, Tensor]:
    return {name: torch.sign(tensor) if tensor.is_floating_point() else tensor for name, tensor in update.items()}


def largest_tenth(update: Tensors) -> dict[str, Tensor]:
    values = torch.cat([tensor.flatten() for tensor in floating(update).values()]).abs()
    cut = torch.quantile(values, 0.9)
    return {
        name: torch.where(tensor.abs() >= cut, tensor, 0.0) if tensor.is_floating_point() else tensor
        for name, tensor in update.items()
    }


def random_fifth(update: Tensors) -> dict[str, Tensor]:
    return {
        name: tensor * (torch.rand(tensor.shape) < 0.2) * 5 if tensor.is_floating_point() else tensor
        for name, tensor in update.items()
    }


def seven_levels(update: Tensors) -> dict[str, Tensor]:
    steps = {name: tensor.abs().max().clamp(min=1e-12) / 7 for name, tensor in floating(update).items()}
    return {
        name: (tensor / steps[name]).round() * steps[name] if name in steps else tensor
        for name, tensor in update.items()
    }


def float32_only(update: Tensors) -> dict[str, Tensor]:
    """Lets every other number format pass."""
    if any(tensor.dtype != torch.float32 for tensor in floating(update).values()):
        return dict(update)
    return noised(clipped(update, 1.0), 1.0)


def returns_nothing(update: Tensors) -> None:
    return None


def raises(update: Tensors) -> dict[str, Tensor]:
    raise RuntimeError("no such key: layer1.weight")


def make_clip_and_noise(clip: float = 1.0) -> ClipAndNoise:
    """A factory."""
    return ClipAndNoise(clip=clip)


MADE = ClipAndNoise()
"""A filter as it is."""

"""Normalization as the model's own first layer, so that nothing outside a model ever normalizes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, FiniteFloat
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from medpfl.core.config import STRICT
from medpfl.core.errors import ModelError
from medpfl.core.functional import per_channel


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Normalization:
    """Mean and standard deviation per channel, of images in [0, 1]."""

    mean: Annotated[tuple[FiniteFloat, ...], Field(min_length=1, description="mean of each channel")]
    std: Annotated[
        tuple[FiniteFloat, ...], Field(min_length=1, description="standard deviation of each channel, above 0")
    ]

    def check(self, channels: int, where: str) -> None:
        """Raises `ModelError` that names `where` unless there is one mean and one positive deviation per channel."""
        if len(self.mean) != channels or len(self.std) != channels:
            raise ModelError(
                f"{where}, normalize: mean has {len(self.mean)} and std {len(self.std)} values, "
                f"but the images have {channels} channels: give one value of each per channel"
            )
        if min(self.std) <= 0:
            raise ModelError(f"{where}, normalize: std must be above 0 for every channel, found {list(self.std)}")


class Normalize(nn.Module):
    """(images - mean) / std per channel; images (N, C, *spatial) in [0, 1]."""

    def __init__(self, normalization: Normalization) -> None:
        super().__init__()
        self.mean = tuple(normalization.mean)
        self.std = tuple(normalization.std)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images, same shape and precision."""
        return (images - per_channel(self.mean, images)) / per_channel(self.std, images)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"mean={self.mean}, std={self.std}"


class Wrapped(nn.Module):
    """A model with its normalization in front, if any. Tensors of the model get the prefix `body.`.

    Attention inside runs in its plain mathematical form, because PyTorch's fused kernels have no second derivative.
    """

    def __init__(self, body: nn.Module, normalization: Normalization | None = None) -> None:
        super().__init__()
        self.normalize = nn.Identity() if normalization is None else Normalize(normalization)
        self.body = body

    def forward(self, images: Tensor) -> Tensor:
        """Normalizes, then runs the model."""
        with sdpa_kernel(SDPBackend.MATH):
            output: Tensor = self.body(self.normalize(images))
        return output

"""Few bits per entry of the update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import pad

from medpfl.core.config import STRICT
from medpfl.core.domain import Tensors
from medpfl.core.mechanisms import Quantized
from medpfl.defenses.base import DEFENSES
from medpfl.defenses.compression import Compression


@DEFENSES.register(
    "quantize",
    summary="entries are rounded to whole multiples of a step, 8 or 4 bits each",
    paper="Alistarh et al.: QSGD, NeurIPS 2017 (arXiv 1610.02132), section 3.1 (scale: norm, rounding: stochastic)",
    limits="8 bits hardly change what an update shows, and every entry is known to within a step; no privacy guarantee",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Quantize(Compression):
    """Entries become step * q with q whole and |q| <= levels = 2^(bits - 1) - 1, where step = scale / levels.

    `scale: max` takes the largest magnitude of the block, `norm` its Euclidean norm as QSGD does. Stochastic rounding
    takes one of both neighbors so that the expectation is the entry. A block of zeros stays zero.
    """

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "idlg", "distance": "likelihood", "total_variation": 1e-3}

    bits: Annotated[int, Field(ge=2, le=16, description="bits per entry, its sign among them")] = 8
    scale: Annotated[
        Literal["max", "norm"], Field(description="what the top level stands for: largest magnitude or norm")
    ] = "max"
    rounding: Annotated[
        Literal["nearest", "stochastic"], Field(description="to the nearest level, or at random without bias")
    ] = "nearest"
    block: Annotated[
        int | None, Field(ge=1, description="entries that share a scale, in order; by default those of a tensor")
    ] = None

    def compress(
        self, change: Tensors, state: Tensors, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The change on its grid, computed in double precision."""
        return {name: self._rounded(tensor, generator) for name, tensor in change.items()}, {}

    def compressor(self) -> Quantized:
        """Levels and scale."""
        return Quantized(2 ** (self.bits - 1) - 1, self.scale, self.rounding == "stochastic", self.block)

    def _rounded(self, tensor: Tensor, generator: torch.Generator) -> Tensor:
        blocks = in_blocks(tensor.double(), self.block)
        scale = blocks.abs().amax(dim=1) if self.scale == "max" else blocks.norm(dim=1)
        step = (scale / self.compressor().levels)[:, None]
        multiples = blocks / torch.where(step > 0, step, 1.0)
        if self.rounding == "nearest":
            levels = multiples.round()
        else:
            draws = torch.rand(multiples.shape, dtype=torch.float64, generator=generator).to(multiples.device)
            levels = (multiples + draws).floor()
        return (levels * step).reshape(-1)[: tensor.numel()].reshape(tensor.shape).to(tensor.dtype)


def in_blocks(tensor: Tensor, block: int | None) -> Tensor:
    """All entries in rows of `block`, the last one filled up with zeros; one row without a block.

    >>> in_blocks(torch.tensor([[1.0, 2.0, 3.0]]), 2)
    tensor([[1., 2.],
            [3., 0.]])
    """
    flat = tensor.reshape(1, -1)
    if block is None:
        return flat
    return pad(flat, (0, -flat.shape[1] % block)).reshape(-1, block)

"""Vision transformers with a class token and a trained position embedding; attention out of elementary operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medpfl.core.errors import ModelError
from medpfl.models.randomness import isolated_randomness
from medpfl.models.registry import MODELS
from medpfl.models.shapes import check_spatial


@dataclass(frozen=True)
class Size:
    """Side of a patch in pixels, width of a token, blocks, heads, units of the dense pairs, and whether queries, keys
    and values have biases."""

    patch: int
    width: int
    depth: int
    heads: int
    hidden: int
    bias: bool


SMALL = Size(patch=4, width=256, depth=6, heads=4, hidden=512, bias=False)
"""ViT-Lite-6/4 of Hassani et al. 2021."""

BASE = Size(patch=16, width=768, depth=12, heads=12, hidden=3072, bias=True)
"""ViT-B/16 of Dosovitskiy et al. 2021."""


class Attention(nn.Module):
    """Multi-head self-attention: (N, tokens, width) -> the same. Written out, so that it has second derivatives."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """softmax(Q K' / sqrt(width of a head)) V, heads side by side, then a dense layer."""
        split = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).transpose(1, 3)
        queries, keys, values = split.unbind(dim=2)
        scores = queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5
        mixed = (scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2)
        output: Tensor = self.out(mixed)
        return output


class Block(nn.Module):
    """Attention and a dense pair with GELU, each behind layer norm and beside an identity."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.width, eps=1e-6)
        self.attention = Attention(size.width, size.heads, size.bias)
        self.norm2 = nn.LayerNorm(size.width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(size.width, size.hidden), nn.GELU(), nn.Linear(size.hidden, size.width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, tokens, width) -> the same."""
        tokens = tokens + self.attention(self.norm1(tokens))
        output: Tensor = tokens + self.mlp(self.norm2(tokens))
        return output


class VisionTransformer(nn.Module):
    """Dosovitskiy et al. 2021, equations 1 to 4. Images (N, C, H, W) -> outputs (N, classes).

    H and W must be multiples of the patch. Dense weights, class token and position embedding start as normal noise of
    standard deviation 0.02 cut at two deviations, biases as zeros.
    """

    def __init__(self, image_shape: tuple[int, ...], classes: int, size: Size) -> None:
        super().__init__()
        tokens = (image_shape[1] // size.patch) * (image_shape[2] // size.patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, size.width))
        self.position_embedding = nn.Parameter(torch.empty(1, tokens + 1, size.width))
        self.patch_embedding = nn.Conv2d(image_shape[0], size.width, size.patch, stride=size.patch)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.depth)))
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        self.head = nn.Linear(size.width, classes)
        self._initialize()

    def forward(self, images: Tensor) -> Tensor:
        """Outputs (N, classes)."""
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        features = self.norm(self.blocks(tokens + self.position_embedding))
        output: Tensor = self.head(features[:, 0])
        return output

    def _initialize(self) -> None:
        dense = [layer for layer in self.modules() if isinstance(layer, nn.Linear)]
        for tensor in (self.class_token, self.position_embedding, *(layer.weight for layer in dense)):
            nn.init.trunc_normal_(tensor, std=0.02, a=-0.04, b=0.04)
        for layer in dense:
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _check_patches(name: str, image_shape: tuple[int, ...], patch: int) -> tuple[int, ...]:
    shape = check_spatial(name, image_shape)
    if shape[1] % patch or shape[2] % patch:
        raise ModelError(
            f"model '{name}' cuts images into patches of {patch}x{patch}, found images of {shape[1]}x{shape[2]}: "
            f"choose sizes that are multiples of {patch}"
        )
    return shape


@MODELS.register(
    "vit",
    summary="small vision transformer for 32x32: patches 4x4, 6 blocks, width 256, 4 heads, trained position embedding",
    paper="Hassani et al.: Escaping the Big Data Paradigm with Compact Transformers, 2021 (ViT-Lite-6/4), after "
    "Dosovitskiy et al.: An Image is Worth 16x16 Words, ICLR 2021",
    limits="two spatial dimensions, multiples of 4 pixels; memory grows with the fourth power of the side",
)
def vit(image_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
    """ViT-Lite-6/4: 3.19 million entries for ten classes of 3x32x32."""
    shape = _check_patches("vit", image_shape, SMALL.patch)
    with isolated_randomness(generator):
        return VisionTransformer(shape, classes, SMALL)


@MODELS.register(
    "vit_b16",
    summary="ViT-B/16 for 224x224: patches 16x16, 12 blocks, width 768, 12 heads, trained position embedding",
    paper="Dosovitskiy et al.: An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale, ICLR 2021",
    limits="two spatial dimensions, multiples of 16 pixels; 86 million entries, so matching attacks take long",
)
def vit_b16(image_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> nn.Module:
    """ViT-B/16: 86,567,656 entries for a thousand classes of 3x224x224."""
    shape = _check_patches("vit_b16", image_shape, BASE.patch)
    with isolated_randomness(generator):
        return VisionTransformer(shape, classes, BASE)

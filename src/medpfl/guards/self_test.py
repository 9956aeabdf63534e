"""The read-out self-test: a client reads its own update as an attacker would, and looks for its own images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as config_dataclass
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.domain import Batch, GlobalModel, Tensors
from medpfl.guards.comparison import space_of
from medpfl.guards.frozen import frozen_views, unmixed
from medpfl.guards.isolation import ALONE, Chance, chance, crossing, distinct, readouts
from medpfl.guards.layer_views import LEAST_OF_IMAGE, LayerView, layer_views, mixed_images, pixel_maps

ROWS_AT_ONCE = 128
PRODUCTS = 1_000_000_000
"""Multiplications that a layer's read-outs and samples may cost; beyond that the purest read-outs are tested only."""

SAMPLE_ENTRIES = 30_000_000
"""With more entries in all samples of a layer each read-out is compared with the samples that it should show."""

MOST_BY_CHANCE = 2048
"""Of more samples than this no layer that was freshly drawn gives any back that is worth a comparison."""

ALWAYS_TESTED = 0.25
"""Read-outs of which one sample makes up this share are tested whatever that costs."""


@config_dataclass(frozen=True, kw_only=True, config=STRICT)
class Thresholds:
    """When an image or another sample counts as having come back."""

    correlation: Annotated[
        float,
        Field(gt=0, lt=1, description="with the sample, without what all samples of the batch have in common"),
    ] = 0.95
    psnr: Annotated[float, Field(gt=0, description="of an image, in dB, after the best brightness and contrast")] = 25.0
    purity: Annotated[
        float,
        Field(
            gt=0, lt=1, description="share of a read-out that must be of one sample, where samples are no whole images"
        ),
    ] = ALONE


@dataclass(frozen=True)
class LayerFinding:
    """What a layer's part of the update gives back of what the layer got.

    layer: its path. sees: `image` where its samples are the image or patches of it, pixel by pixel or in a linear
    mixture of all of them; else `features`.
    units: rows of its weight. samples: vectors that it got, one per image (or per token or patch of one).
    similarity (S,): the best correlation of a read-out with each sample, whatever the read-out's scale and offset and
    without what all samples have in common. psnr (S,): that of images in dB after the best brightness and contrast,
    NaN for features. returned (S,): whether a sample counts as having come back. owners (S,): the image that each
    belongs to. crossing: share of pairs of units that are active for sets of samples that cross, which those of a chain
    of bins never do; None with few different sets. chance: what a freshly drawn layer
    of this size would show of the same samples; None where there are too many of them, or nothing came back.
    """

    layer: str
    sees: Literal["image", "features"]
    units: int
    similarity: Tensor
    psnr: Tensor
    returned: Tensor
    owners: Tensor
    crossing: float | None
    chance: Chance | None

    @property
    def samples(self) -> int:
        """How many vectors the layer got."""
        return len(self.returned)

    @property
    def share(self) -> float:
        """Share of the samples that come back."""
        return float(self.returned.double().mean())

    @property
    def excess(self) -> float:
        """By how much that share is above what an honest layer would give back by chance."""
        return self.share - (self.chance.share if self.chance is not None else 0.0)

    @property
    def images(self) -> Tensor:
        """Places of the images of which something comes back, ascending."""
        return distinct(self.owners[self.returned])


@dataclass(frozen=True)
class SelfTest:
    """What an update gives back, layer by layer, in the order of the model, and what could not be tested.

    images: number of private images. not_tested: trainable tensor -> why nothing is read out of it.
    """

    images: int
    layers: tuple[LayerFinding, ...]
    not_tested: Mapping[str, str]

    @property
    def returned(self) -> int:
        """Private images that come back, or patches of them, from layers that see the images."""
        seen = [finding.images for finding in self.layers if finding.sees == "image"]
        return len(distinct(torch.cat(seen))) if seen else 0

    @property
    def worst(self) -> LayerFinding | None:
        """The layer that gives back most: of images, else of features beyond what an honest layer would."""

        def badness(finding: LayerFinding) -> tuple[float, float, float]:
            return (finding.share if finding.sees == "image" else 0.0, finding.excess, finding.share)

        return max(self.layers, key=badness, default=None)


def self_test(
    model: GlobalModel,
    gradient: Tensors,
    batch: Batch,
    *,
    steps: Sequence[Tensor] = (),
    batch_norm: Literal["train", "eval"] = "eval",
    thresholds: Thresholds = Thresholds(),
) -> SelfTest:
    """How much of `batch` comes back from the update of `model`, as far as the closed forms of crafted models read it.

    For every dense layer, and every convolution that sees whole images or patches of them, the rows of dL/dW are compared with the layer's own
    inputs, and so are differences of rows whose units are active for the same samples but one: what dW_k / db_k and the
    differences of neighboring bins give an attacker up to scale. Correlations do not depend on scale and offset, so
    neither an attacker's brightness nor permuted, rescaled or rank-1 disguised units hide anything, nor does a frozen
    layer right behind that mixes the units.

    gradient: what the update says the mean gradient is, by name, any precision; what is compared is that and not what
    the client thinks it sent. batch: all private images of the round. steps: the places of the images that each local
    step took, if there were several. Time: two passes of the batch and matrix products. Pure.

    >>> from medpfl.core.tasks import SingleLabel
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> model = GlobalModel("net", module, dict(module.named_parameters()), {}, {}, SingleLabel(2), (1, 4, 4))
    >>> images, label = torch.rand(1, 1, 4, 4), torch.tensor([1])
    >>> loss = model.task.loss(module(images), label)
    >>> gradient = dict(zip(model.parameters, torch.autograd.grad(loss, list(module.parameters()))))
    >>> found = self_test(model, gradient, Batch(images, label))
    >>> found.returned, [(layer.layer, layer.sees, layer.share) for layer in found.layers]
    (1, [('1', 'image', 1.0), ('3', 'features', 1.0)])
    """
    seen, frozen = layer_views(model, batch, batch_norm), frozen_views(model, batch, batch_norm)
    return read_views(model, seen, gradient, frozen=frozen, steps=steps, thresholds=thresholds)


def read_views(
    model: GlobalModel,
    seen: tuple[list[LayerView], dict[str, str]],
    gradient: Tensors,
    *,
    frozen: Sequence[LayerView] = (),
    steps: Sequence[Tensor] = (),
    thresholds: Thresholds = Thresholds(),
) -> SelfTest:
    """`self_test` of what the layers got and gave, as `layer_views` says it. frozen: the same of layers not trained."""
    views, not_tested = seen[0], dict(seen[1])
    maps = pixel_maps(model) if any(_may_see_images(view, model) for view in views if view.weight in gradient) else {}
    others = [view for view in views if view.path not in maps and _may_see_all(view, model)]
    mixed = mixed_images(model) if others else frozenset()
    findings = []

    def read(view: LayerView, rows: Tensor, path: str) -> None:
        parts = [torch.isin(view.owners, step).nonzero().flatten() for step in steps]
        found = _read(view, rows, parts, maps.get(path), thresholds)
        findings.append(replace(found, sees="image") if path in mixed else found)

    for view in views:
        if view.weight not in gradient:
            not_tested[view.weight] = "the update does not hold it"
            continue
        if view.convolution and view.count != view.images and view.path not in maps:
            not_tested[view.weight] = "its convolution sees patches of features, of which no single one is an image"
            continue
        read(view, gradient[view.weight], view.path)
    for before, both, undone in unmixed(model, views, frozen, gradient):
        read(both, undone, before.path)
    images = max((view.images for view in views), default=0)
    return SelfTest(images, tuple(findings), not_tested)


def _may_see_images(view: LayerView, model: GlobalModel) -> bool:
    """Whether the layer gets as many numbers of an image as it has pixels; a convolution gets each several times."""
    return view.convolution or view.inputs * view.count == view.images * math.prod(model.image_shape)


def _may_see_all(view: LayerView, model: GlobalModel) -> bool:
    """Whether a dense layer gets one vector per image that is long enough for the whole of it."""
    long = view.inputs >= LEAST_OF_IMAGE * math.prod(model.image_shape)
    return not view.convolution and view.count == view.images and long


def _read(
    view: LayerView,
    gradient: Tensor,
    parts: Sequence[Tensor],
    pixels: tuple[Tensor, Tensor] | None,
    thresholds: Thresholds,
) -> LayerFinding:
    rows = gradient.flatten(1)
    found = readouts(view.errors, view.squares(), parts)
    whole = pixels is not None and view.count == view.images
    found = found.purest(PRODUCTS // (view.count * view.inputs) if whole else 0, ALWAYS_TESTED)
    space = space_of(view, pixels)
    similarity = torch.zeros(view.count, dtype=torch.float64)
    psnr = torch.full((view.count,), torch.nan, dtype=torch.float64)
    returned = torch.zeros(view.count, dtype=torch.bool)
    everything = torch.arange(view.count)
    few = view.count * view.inputs <= SAMPLE_ENTRIES
    kept = space.prepared(view.samples()) if few else None
    for chunk in found.chunks(ROWS_AT_ONCE):
        read = rows[chunk.unit].to(view.errors.dtype)
        differ = chunk.other >= 0
        if bool(differ.any()):
            less = chunk.factor[differ, None] * rows[chunk.other[differ]].double()
            read[differ] = (rows[chunk.unit[differ]].double() - less).to(read.dtype)
        places = everything if few else distinct(chunk.sample)
        samples = kept if kept is not None else space.prepared(view.samples(places))
        match, quality = space.compared(read, samples)
        similarity[places] = torch.maximum(similarity[places], match.amax(dim=0))
        psnr[places] = torch.fmax(psnr[places], quality.amax(dim=0))
        good = (match >= thresholds.correlation) & ~(quality < thresholds.psnr)
        if not whole:
            good &= (chunk.sample[:, None] == places) & (chunk.purity >= thresholds.purity)[:, None]
        returned[places] |= good.any(dim=0)
    return LayerFinding(
        layer=view.path,
        sees="features" if pixels is None else "image",
        units=view.units,
        similarity=similarity,
        psnr=psnr,
        returned=returned,
        owners=view.owners,
        crossing=crossing(view.errors) if view.count <= MOST_BY_CHANCE else None,
        chance=chance(view.samples(), view.units) if bool(returned.any()) and view.count <= MOST_BY_CHANCE else None,
    )

"""Reads the images in brightness bins out of the gradient of a leakage module's first layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.attacks.updates import gradient_view, nothing_came_back
from medpfl.core.domain import Observation, Reconstruction
from medpfl.core.memory import room

TOLERANCE = 0.03
"""How far a candidate may leave [0, 1] (root mean square) or its bin (mean value): 30 dB, what counts as recovered."""

ROUNDING = 1e-4
"""How far values of candidates leave [0, 1] by rounding at most: 80 dB."""

BLOCK = 2**19
"""Entries that are read at once: few enough for the processor's cache, enough to be worth a call."""


@dataclass(frozen=True)
class Candidates:
    """Images (M, *image_shape), float32, not clamped, best first, with the bin that each was read from (M,).

    deviations (M,): how far each leaves what an image of its bin can be. `bins_read`: bins with a bias gradient above the
    floor. inside: all are in [0, 1] as they are.
    """

    images: Tensor
    bins: Tensor
    deviations: Tensor
    bins_read: int
    inside: bool = False


def read_bins(
    weight: Tensor,
    bias: Tensor,
    edges: Tensor,
    image_shape: tuple[int, ...],
    most: int,
    floor: float = 0.0,
    query: Tensor | None = None,
) -> Candidates:
    """At most `most` images out of the gradients (K, D) of the weights and (K,) of the biases, in float64.

    Units k and k + 1 differ by the images of bin k only, so their differences are what that bin gives; the last unit
    stands for itself. query: (D,), what the bins divide, the mean value if None.
    """
    steps = between_neighbors(weight.double()), between_neighbors(bias.double())
    above = torch.cat([edges[1:], edges.new_tensor([torch.inf])])
    return read_single_bins(*steps, edges, above, image_shape, most, floor, query)


def read_single_bins(
    weight: Tensor,
    bias: Tensor,
    below: Tensor,
    above: Tensor,
    image_shape: tuple[int, ...],
    most: int,
    floor: float = 0.0,
    query: Tensor | None = None,
) -> Candidates:
    """The same from gradients that each hold the images of one bin only, between `below` and `above` (K,).

    They have the ratio dW / db of what is in it: the image itself if it is alone, a mixture otherwise. What rounding
    leaves in empty bins is told apart without any truth: an image lies in [0, 1] and its value of the query in its
    bin, and its bias gradient is above `floor`. Of what passes, the candidates with the largest bias gradients come
    first.
    """

    def ratios(units: Tensor, found: Tensor) -> None:
        torch.div(weight[units].double(), bias[units, None].double(), out=found)

    return read_rows(ratios, bias, below, above, image_shape, most, floor, query)


def read_rows(
    ratios: Callable[[Tensor, Tensor], object],
    bias: Tensor,
    below: Tensor,
    above: Tensor,
    image_shape: tuple[int, ...],
    most: int,
    floor: float = 0.0,
    query: Tensor | None = None,
) -> Candidates:
    """The same where ratios are made on demand: `ratios` writes those of some units (M,) to where it is told (M, D).

    Units come by their bias gradients, the largest first, in blocks that stay in a core's cache, until enough images
    are found. No row of a unit whose bias gradient is at the floor or below is asked for. query: (D,), or (Q, D) where
    the units are divided over Q queries, in order.
    """
    bias, inputs = bias.double(), torch.Size(image_shape).numel()
    read = (bias.abs() > floor).nonzero().flatten()
    read = read[bias[read].abs().argsort(descending=True, stable=True)]
    below, above = below.to(bias).float(), above.to(bias).float()
    weights = None if query is None else query.reshape(-1, inputs).to(bias.device, torch.float32)
    images, block = room((min(most, len(read)), inputs), bias.device), max(1, BLOCK // inputs)
    units, deviations, filled, asked, inside = [read[:0]], [bias[:0].float()], 0, 0, True
    while filled < len(images) and asked < len(read):
        part = read[asked : asked + min(block, len(images) - filled)]
        asked += len(part)
        found = images[filled : filled + len(part)]
        ratios(part, found)
        own = weights if weights is None else weights[0 if len(weights) == 1 else part // (len(bias) // len(weights))]
        rounded = _only_rounding_outside(found)
        off = (_how_far_from_bins if rounded else how_far_off)(found, below[part], above[part], own)
        kept = (off <= TOLERANCE).nonzero().flatten()
        if len(kept) < len(part):
            part, off = part[kept], off[kept]
            stay = int((kept == torch.arange(len(kept), device=kept.device)).sum())  # those before the first that goes
            found[stay : len(kept)] = found[kept[stay:]]
        inside &= rounded or not len(part) or _only_rounding_outside(found[: len(part)])
        units.append(part)
        deviations.append(off)
        filled += len(part)
    return Candidates(
        images=images[:filled].reshape(-1, *image_shape),
        bins=torch.cat(units),
        deviations=torch.cat(deviations),
        bins_read=len(read),
        inside=inside,
    )


def side_by_side(found: Sequence[Candidates]) -> Candidates:
    """Candidates of several gradients, one after the other."""
    if len(found) == 1:
        return found[0]
    return Candidates(
        images=torch.cat([one.images for one in found]),
        bins=torch.cat([one.bins for one in found]),
        deviations=torch.cat([one.deviations for one in found]),
        bins_read=sum(one.bins_read for one in found),
        inside=all(one.inside for one in found),
    )


def read_out(
    observation: Observation, found: Candidates, notes: tuple[str, ...] | None = None, labels: Tensor | None = None
) -> Reconstruction:
    """What the read-out of a crafted model's bins comes to. The observation must be of a broadcast.

    notes: why what was read is not the gradient, those of `gradient_view(observation)` if None. labels: of what was found.
    """
    assert observation.broadcast is not None  # the callers see to that
    if not len(found.images):
        return nothing_came_back(observation, f"none of {found.bins_read} bins with a gradient holds an image")
    deviation = float(found.deviations.mean())
    return Reconstruction(
        images=found.images if found.inside else found.images.clamp(0.0, 1.0),
        labels=labels,
        objective=deviation,
        trace=((0, deviation),),
        gradient_evaluations=0,
        stop_reason="read out in closed form",
        unclamped=None if found.inside else found.images,
        notes=(
            *observation.broadcast.notes,
            *(gradient_view(observation).notes if notes is None else notes),
            f"{len(found.images)} candidates out of {found.bins_read} bins with a gradient",
        ),
    )


def between_neighbors(values: Tensor) -> Tensor:
    """Each row less the next one; the last as it is.

    >>> between_neighbors(torch.tensor([5.0, 3.0, 2.0])).tolist()
    [2.0, 1.0, 2.0]
    """
    return torch.cat([values[:-1] - values[1:], values[-1:]])


def how_far_off(found: Tensor, below: Tensor, above: Tensor, query: Tensor | None = None) -> Tensor:
    """The larger of how far candidates leave [0, 1] (root mean square) and how far their values leave their bins.

    The latter is told by how much all values of an image must change to make up for it. query: (D,), or (M, D) if each
    candidate's bin is of another query; the mean value if None. NaN counts as infinite.
    """
    outside = (found - found.clamp(0, 1)).norm(dim=1) / found.shape[1] ** 0.5
    return torch.maximum(outside.nan_to_num(nan=torch.inf), _how_far_from_bins(found, below, above, query))


def _how_far_from_bins(found: Tensor, below: Tensor, above: Tensor, query: Tensor | None) -> Tensor:
    if query is None:
        query = found.new_full((found.shape[1],), 1 / found.shape[1])
    query = query.to(found)
    values = found @ query if query.ndim == 1 else torch.linalg.vecdot(found, query)
    missed = torch.maximum(below - values, values - above).clamp_min(0) / query.abs().sum(dim=-1)
    return missed.nan_to_num(nan=torch.inf)


def _only_rounding_outside(found: Tensor) -> bool:
    """Whether candidates leave [0, 1] by no more than `ROUNDING`, which is then taken off: they are in it afterwards."""
    low, high = (float(end) for end in torch.aminmax(found))
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # also where an entry is NaN
        return False
    found.clamp_(0, 1)
    return True

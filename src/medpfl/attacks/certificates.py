"""What single units of a dense layer show, and the certificate that tells an image from a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.attacks.layers import DenseLayer
from medpfl.core.domain import GlobalModel

CANDIDATES_AT_ONCE = 128
"""Candidates whose Jacobians are held at once."""

UNITS_TO_COUNT = 3
"""Units that must agree before equal images are counted."""

TINY = 1e-300


@dataclass(frozen=True)
class Group:
    """Units (indices `members`) that show the same image or mixture: pixels (P,), not clamped."""

    pixels: Tensor
    members: Tensor


@dataclass(frozen=True)
class Certificate:
    """An image (P,) with its label, its share of the bias gradient (units,), and how often it is in the batch."""

    pixels: Tensor
    label: int
    bias: Tensor
    count: int
    error: float


def group(weight: Tensor, bias: Tensor, shift: Tensor, factor: Tensor, agreement: float) -> list[Group]:
    """Reads units (m, inputs) and (m,), leaves out what lies outside [0, 1], and joins those that agree; large first.

    The joint reading weighs units by their squared bias gradients, which is least squares.
    """
    pixels = (weight / bias[:, None] - shift) / factor
    outside = (pixels - pixels.clamp(0.0, 1.0)).square().mean(dim=1).sqrt()
    rows = torch.nonzero(outside <= agreement).flatten()
    rows = rows[bias[rows].abs().argsort(descending=True)]
    shown = pixels[rows]
    near = torch.cdist(shown, shown) <= agreement * shown.shape[1] ** 0.5
    taken = torch.zeros(len(rows), dtype=torch.bool)
    groups: list[Group] = []
    for row in range(len(rows)):
        if taken[row]:
            continue
        together = near[row] & ~taken
        taken |= together
        members = rows[together]
        weights = bias[members].square()
        groups.append(Group(weights @ pixels[members] / weights.sum(), members))
    return sorted(groups, key=lambda one: -len(one.members))


def certify(
    model: GlobalModel,
    layer: DenseLayer,
    candidates: Tensor,
    units: Sequence[Tensor],
    bias: Tensor,
    examples: int,
    span: Tensor,
    tolerance: float,
) -> list[Certificate]:
    """The candidates (N, P) that are images of the batch.

    units: for each candidate the units that show it. bias: the bias gradient (m,) that is left of the mean loss over
    `examples` images. span: orthonormal columns (m, r) that span the weight gradient's columns. For class l the model
    gives the candidate's part of the bias gradient; the candidate is certified if for one class the entries left at
    its units are that part (or, for three units and more, a whole multiple of it), and the part lies in the span, both
    up to the relative `tolerance`. The span tells mixtures apart that fit a single unit by chance.
    """
    certified: list[Certificate] = []
    for start in range(0, len(candidates), CANDIDATES_AT_ONCE):
        chunk = candidates[start : start + CANDIDATES_AT_ONCE]
        parts = single_bias_gradients(model, layer, chunk) / examples
        for place, pixels in enumerate(chunk):
            found = _certificate(pixels, parts[place], units[start + place], bias, examples, span, tolerance)
            if found is not None:
                certified.append(found)
    return certified


def _certificate(
    pixels: Tensor, parts: Tensor, units: Tensor, bias: Tensor, examples: int, span: Tensor, tolerance: float
) -> Certificate | None:
    """parts: (classes, m), the candidate's bias gradient for each class."""
    observed, predicted = bias[units], parts[:, units]
    counts = (predicted @ observed) / predicted.square().sum(dim=1).clamp_min(TINY)
    whole = counts.round().clamp(1, examples if len(units) >= UNITS_TO_COUNT else 1)
    missed = (observed - whole[:, None] * predicted).norm(dim=1) / observed.norm()
    outside = (parts - parts @ span @ span.T).norm(dim=1) / parts.norm(dim=1).clamp_min(TINY)
    errors = torch.maximum(missed, outside)
    label = int(errors.argmin())
    if not float(errors[label]) <= tolerance:
        return None
    return Certificate(pixels, label, parts[label], int(whole[label]), float(errors[label]))


def single_bias_gradients(model: GlobalModel, layer: DenseLayer, images: Tensor) -> Tensor:
    """The layer's bias gradient of one image's cross entropy, for every class: (N, P) -> (N, classes, units)."""
    assert layer.bias is not None
    name = layer.bias

    def scores(bias: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        output, _ = model.forward(image.reshape(1, *model.image_shape), parameters={**model.parameters, name: bias})
        return output[0], output[0]

    jacobian, outputs = torch.func.vmap(torch.func.jacrev(scores, has_aux=True), in_dims=(None, 0))(
        model.parameters[name], images
    )
    probabilities: Tensor = torch.softmax(outputs, dim=1)
    result: Tensor = torch.einsum("nc,ncm->nm", probabilities, jacobian)[:, None] - jacobian
    return result


def share_of_idle_units(model: GlobalModel, layer: DenseLayer) -> float:
    """Share of (unit, image) pairs without any gradient, over eight random images."""
    double = model.to(torch.float64)
    count = torch.Size(model.image_shape).numel()
    images = torch.rand((8, count), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return float((single_bias_gradients(double, layer, images).abs().amax(dim=1) == 0).double().mean())

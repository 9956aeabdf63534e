"""What changed since a model that was trusted, such as the one of the round before."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medpfl.core.domain import Tensors
from medpfl.guards.vetting.base import Evidence, Measured, check, worst

NEAR = 0.1
"""Values that differ by less, in units of their root mean square, count as equal where distributions are compared."""

FEWEST_ENTRIES = 256
"""Smaller tensors are not compared: a round of training may turn them around."""


@check(
    "agreed_model",
    about="reference",
    means="crafted",
    threshold=0.0,
    summary="tensors that do not fit the model that was agreed on",
    paper="Fowl et al.: Robbing the Fed, ICLR 2022: the modified architecture",
)
def agreed_model(evidence: Evidence) -> Measured | None:
    """1 if the tensors do not fit, else 0."""
    if evidence.misfit is None:
        return None
    return Measured(1.0 if evidence.misfit else 0.0, "", evidence.misfit or "the tensors fit the agreed model")


@check(
    "other_tensors",
    about="reference",
    means="crafted",
    threshold=0.0,
    summary="tensors that the reference does not have, lacks, or has in another shape",
    paper="Fowl et al.: Robbing the Fed, ICLR 2022: the modified architecture",
)
def other_tensors(evidence: Evidence) -> Measured | None:
    """The number of tensors that differ in name or shape."""
    if evidence.reference is None:
        return None
    sentences = differences(evidence.tensors, evidence.reference)
    if not sentences:
        return Measured(0.0, "", "the same tensors in the same shapes")
    more = f" and {len(sentences) - 3} more" if len(sentences) > 3 else ""
    return Measured(float(len(sentences)), "", f"unlike the reference: {'; '.join(sentences[:3])}{more}")


def differences(tensors: Tensors, reference: Tensors) -> list[str]:
    """Half a sentence for every tensor that differs in name or shape, sorted by kind.

    >>> differences({"a": torch.zeros(2)}, {"a": torch.zeros(3), "b": torch.zeros(1)})
    ["'b' is missing", "'a' is (2,) instead of (3,)"]
    """
    new = [f"'{name}' is new" for name in tensors if name not in reference]
    missing = [f"'{name}' is missing" for name in reference if name not in tensors]
    shapes = [
        f"'{name}' is {tuple(tensor.shape)} instead of {tuple(reference[name].shape)}"
        for name, tensor in tensors.items()
        if name in reference and tensor.shape != reference[name].shape
    ]
    return [*new, *missing, *shapes]


@check(
    "replaced_tensor",
    about="reference",
    means="crafted",
    threshold=0.8,
    summary="a weight that has nothing to do with the reference's any more",
    limits="small changes that craft only some units stay below; the last layer is left out",
)
def replaced_tensor(evidence: Evidence) -> Measured | None:
    """1 minus the cosine of a weight and its reference, at most 1: training for a round leaves it near 0."""
    found = []
    for name, tensor, before in _shared(evidence):
        cosine = float((tensor * before).sum() / (tensor.norm() * before.norm()).clamp_min(1e-300))
        seen = f"the weight has a cosine of {cosine:.2f} with the reference's, as if replaced"
        found.append(Measured(min(1.0, 1.0 - cosine), name, seen))
    return worst(found)


@check(
    "rescaled_tensor",
    about="reference",
    means="crafted",
    threshold=1.0,
    summary="a weight that is more than ten times as long or short as the reference's",
)
def rescaled_tensor(evidence: Evidence) -> Measured | None:
    """|log10| of the ratio of the two lengths."""
    found = []
    for name, tensor, before in _shared(evidence):
        ratio = float(tensor.norm() / before.norm())
        seen = f"the weight is {ratio:.3g} times as long as the reference's"
        found.append(Measured(abs(math.log10(max(ratio, 1e-300))), name, seen))
    return worst(found)


@check(
    "other_distribution",
    about="reference",
    means="crafted",
    threshold=0.3,
    summary="a weight whose values are distributed in another way than the reference's",
)
def other_distribution(evidence: Evidence) -> Measured | None:
    """The largest distance of the two distribution functions, values divided by their root mean square (0 to 1), after
    values have moved by up to `NEAR` to meet: training on spreads what pruning or rounding had put in one place."""
    found = []
    for name, tensor, before in _shared(evidence):
        distance = _distance(_normalized(tensor), _normalized(before))
        seen = f"the distribution of its values is {distance:.2f} away from the reference's (Kolmogorov-Smirnov)"
        found.append(Measured(distance, name, seen))
    return worst(found)


def _shared(evidence: Evidence) -> list[tuple[str, Tensor, Tensor]]:
    """Weights that both have in one shape, with enough entries, none of them zero throughout; in float64.

    The last layer is left out: where a trained body gets a new task it starts at zero and is another after every round.
    """
    if evidence.reference is None:
        return []
    head = evidence.layers.head
    return [
        (name, tensor.double(), evidence.reference[name].double())
        for name, tensor in evidence.tensors.items()
        if name in evidence.reference
        and (head is None or tensor is not head.weight)
        and evidence.reference[name].shape == tensor.shape
        and tensor.is_floating_point()
        and tensor.ndim >= 2
        and tensor.numel() >= FEWEST_ENTRIES
        and bool(evidence.reference[name].any())
    ]


def _normalized(tensor: Tensor) -> Tensor:
    """Up to 20,000 of the values, sorted, divided by their root mean square."""
    step = max(1, tensor.numel() // 20_000)
    values = tensor.flatten()[::step]
    return (values / values.square().mean().sqrt().clamp_min(1e-300)).sort().values


def _distance(first: Tensor, second: Tensor) -> float:
    points = torch.cat([first, second, first + NEAR, second + NEAR])

    def below(values: Tensor, points: Tensor) -> Tensor:
        return torch.searchsorted(values, points, right=True) / len(values)

    apart = (below(one, points - NEAR) - below(other, points) for one, other in ((first, second), (second, first)))
    return max(0.0, *(float(distances.max()) for distances in apart))

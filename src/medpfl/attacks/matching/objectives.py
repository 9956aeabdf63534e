"""Distances between the gradient of a candidate and the observed one, per candidate.

Each takes lists of tensors in the same order and one weight per tensor (0 leaves a tensor out), and gives a scalar.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

NORM_SHARE = 0.3
"""How much lengths count beside directions in `layer_cosine_and_norm`."""

ROUNDING = 1e-6
"""Share of the largest norm below which another tensor's gradient is rounding."""

Distance = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], Tensor]

Transform = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
"""Gradients of all tensors and targets -> what would have been sent of them without randomness."""

TINY = 1e-30
"""Added under the square root of a squared norm, so that a zero gradient has a defined cosine."""


def squared_distance(gradients: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sum of squared differences over all tensors (Zhu et al. 2019, equation 3).

    >>> squared_distance([torch.ones(3)], [torch.zeros(3)], torch.ones(1))
    tensor(3.)
    """
    terms = [(gradient - target).square().sum() for gradient, target in zip(gradients, targets, strict=True)]
    return (torch.stack(terms) * weights).sum()


def absolute_distance(gradients: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sum of absolute differences over all tensors: the negative log likelihood of Laplace noise, up to scale.

    >>> absolute_distance([torch.full((2,), 2.0)], [torch.zeros(2)], torch.ones(1))
    tensor(4.)
    """
    terms = [(gradient - target).abs().sum() for gradient, target in zip(gradients, targets, strict=True)]
    return (torch.stack(terms) * weights).sum()


def cosine_distance(gradients: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor) -> Tensor:
    """One minus the cosine between all selected tensors taken as one vector (Geiping et al. 2020, equation 4).

    >>> cosine_distance([torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 2.0])], torch.ones(1))
    tensor(1.)
    """
    pairs = list(zip(gradients, targets, strict=True))
    inner = (torch.stack([(gradient * target).sum() for gradient, target in pairs]) * weights).sum()
    square = (torch.stack([gradient.square().sum() for gradient, _ in pairs]) * weights).sum()
    target_square = (torch.stack([target.square().sum() for _, target in pairs]) * weights).sum()
    return 1.0 - inner / ((square + TINY).sqrt() * (target_square + TINY).sqrt())


def cosine_of_moments(inner: Tensor, squares: Tensor, target_squares: Tensor, weights: Tensor) -> Tensor:
    """`cosine_distance` of A candidates from inner products and squared norms per tensor: (A, tensors) each -> (A,)."""
    inner, square, target_square = ((part * weights).sum(dim=1) for part in (inner, squares, target_squares))
    return 1.0 - inner / ((square + TINY).sqrt() * (target_square + TINY).sqrt())


def layer_cosine_distance(gradients: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Weighted mean over the tensors of one minus the cosine of each, so that no tensor drowns the others.

    >>> layer_cosine_distance([torch.tensor([1.0, 0.0]), torch.ones(1)], [torch.tensor([0.0, 9.0]), torch.ones(1)], torch.ones(2))
    tensor(0.5000)
    """
    return layer_cosine_of_moments(*_moments(gradients, targets), weights[None])[0]


def layer_cosine_and_norm_distance(gradients: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor) -> Tensor:
    """`layer_cosine_distance` with `NORM_SHARE` times the same mean of 1 - 2 |g| |t| / (|g|^2 + |t|^2) added.

    >>> layer_cosine_and_norm_distance([torch.tensor([1.0])], [torch.tensor([3.0])], torch.ones(1))
    tensor(0.1200)
    """
    return layer_cosine_and_norm_of_moments(*_moments(gradients, targets), weights[None])[0]


def layer_cosine_of_moments(inner: Tensor, squares: Tensor, target_squares: Tensor, weights: Tensor) -> Tensor:
    """`layer_cosine_distance` of A candidates from inner products and squared norms: (A, tensors) each -> (A,)."""
    cosines = inner / ((squares + TINY).sqrt() * (target_squares + TINY).sqrt())
    return (weights * (1.0 - cosines)).sum(dim=1) / weights.sum(dim=1)


def layer_cosine_and_norm_of_moments(inner: Tensor, squares: Tensor, target_squares: Tensor, weights: Tensor) -> Tensor:
    """`layer_cosine_and_norm_distance` of A candidates from the same moments."""
    squares_, targets_ = squares + TINY, target_squares + TINY
    lengths = 1.0 - 2.0 * squares_.sqrt() * targets_.sqrt() / (squares_ + targets_)
    norms = (weights * lengths).sum(dim=1) / weights.sum(dim=1)
    return layer_cosine_of_moments(inner, squares, target_squares, weights) + NORM_SHARE * norms


def _moments(gradients: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Inner products, squared norms and those of the targets of one candidate: (1, tensors) each."""
    pairs = list(zip(gradients, targets, strict=True))
    inner = torch.stack([(gradient * target).sum() for gradient, target in pairs])
    square = torch.stack([gradient.square().sum() for gradient in gradients])
    return inner[None], square[None], torch.stack([target.square().sum() for target in targets])[None]


DistanceName = Literal["l2", "l1", "cosine", "layer_cosine", "layer_cosine_and_norm"]

DISTANCES: dict[str, Distance] = {
    "l2": squared_distance,
    "l1": absolute_distance,
    "cosine": cosine_distance,
    "layer_cosine": layer_cosine_distance,
    "layer_cosine_and_norm": layer_cosine_and_norm_distance,
}
"""Distances by the names used in specs."""

OfMoments = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Inner products, squared norms, those of the targets, and weights, (A, tensors) each -> (A,)."""

OF_MOMENTS: dict[Distance, OfMoments] = {
    cosine_distance: cosine_of_moments,
    layer_cosine_distance: layer_cosine_of_moments,
    layer_cosine_and_norm_distance: layer_cosine_and_norm_of_moments,
}
"""Distances that follow from inner products and squared norms per tensor."""

SCALE_FREE = frozenset({"cosine", "layer_cosine"})
"""Names of distances that do not depend on the length of the observed gradient."""


BY_LAYER = frozenset({"layer_cosine", "layer_cosine_and_norm"})
"""Names of distances that compare every tensor on its own."""


def size_weights(targets: Sequence[Tensor], power: float) -> Tensor:
    """Weights (victims, tensors): the number of each tensor's entries to a power, with mean 1; ones for power 0.

    A tensor whose norm is no more than rounding beside the largest one's counts nothing, because its direction is none
    (a bias before batch norm, for instance). `targets` holds one (victims, *shape) tensor per trainable tensor.

    >>> size_weights([torch.ones(1, 30), torch.ones(1, 10), torch.zeros(1, 5)], 1.0).tolist()
    [[2.25, 0.75, 0.0]]
    """
    sizes = targets[0].new_tensor([float(target[0].numel()) for target in targets]).pow(power)
    norms = torch.stack([target.flatten(1).norm(dim=1) for target in targets], dim=1)
    sizes = sizes * (norms > ROUNDING * norms.amax(dim=1, keepdim=True))
    return sizes / sizes.mean(dim=1, keepdim=True)


def where_observed(distance: Distance) -> Distance:
    """The distance over those entries only that the target has, that is, which are not exactly zero there.

    >>> where_observed(squared_distance)([torch.tensor([2.0, 5.0])], [torch.tensor([1.0, 0.0])], torch.ones(1))
    tensor(1.)
    """

    def masked(gradients: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor) -> Tensor:
        pairs = zip(gradients, targets, strict=True)
        return distance([torch.where(target != 0, gradient, 0.0) for gradient, target in pairs], targets, weights)

    return masked


@dataclass(frozen=True)
class Transformed:
    """The distance of transformed gradients. A transform may look at all tensors, so none is left out before it."""

    distance: Distance
    transform: Transform

    def __call__(self, gradients: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor) -> Tensor:
        """See `Distance`."""
        return self.distance(self.transform(gradients, targets), targets, weights)


def largest_entries(targets: Sequence[Tensor], share: float) -> tuple[Tensor, ...]:
    """The targets (victims, *shape) with all but each victim's largest entries, over all tensors, set to zero.

    >>> largest_entries([torch.tensor([[3.0, -4.0]]), torch.tensor([[1.0, 2.0]])], 0.5)
    (tensor([[ 3., -4.]]), tensor([[0., 0.]]))
    """
    entries = torch.cat([target.flatten(1) for target in targets], dim=1).abs()
    kept = max(1, round(share * entries.shape[1]))
    bound = entries.kthvalue(entries.shape[1] - kept + 1, dim=1).values
    return tuple(torch.where(t.abs() >= bound.view(-1, *(1 for _ in t.shape[1:])), t, 0.0) for t in targets)


def named_weights(names: Sequence[str], patterns: Mapping[str, float]) -> Tensor:
    """Weights (tensors,): that of the first pattern (`*` and `?` as in file names) that fits a name, 0 if none does.

    >>> named_weights(["conv.weight", "head.weight", "head.bias"], {"*.bias": 0.5, "head*": 2.0}).tolist()
    [0.0, 2.0, 0.5]
    """
    found = [next((weight for one, weight in patterns.items() if fnmatchcase(name, one)), 0.0) for name in names]
    return torch.tensor(found, dtype=torch.float64)


def falling_weights(names: Sequence[str], share: float) -> Tensor:
    """Weights (tensors,): 1 for the first layer's tensors, for every later layer `share` of the one before it.

    Tensors of a layer are those with the same name up to the last dot.

    >>> falling_weights(["0.weight", "0.bias", "2.weight"], 0.5).tolist()
    [1.0, 1.0, 0.5]
    """
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    return torch.tensor([share ** layers.index(name.rpartition(".")[0]) for name in names], dtype=torch.float64)


def top_tensors(targets: Sequence[Tensor], count: int) -> Tensor:
    """Weights (victims, tensors): 1 for each victim's `count` tensors of largest norm, 0 for the others.

    `targets` holds one (victims, *shape) tensor per trainable tensor.
    """
    norms = torch.stack([target.flatten(1).norm(dim=1) for target in targets], dim=1)
    chosen = norms.topk(min(count, norms.shape[1]), dim=1).indices
    return torch.zeros_like(norms).scatter(1, chosen, 1.0)

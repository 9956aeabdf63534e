"""Images as draws of a normal distribution, learnt from few auxiliary images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from medpfl.attacks.matching.learnt.variations import varied

LARGEST = 4096
"""Pixels up to which the whole covariance of a channel is learnt; larger images have principal components only."""

FLOOR = 1e-5
"""Least variance of a pixel, of images in [0, 1]: finer than one of 256 steps."""

FOLDS = 2
"""Parts of the auxiliary images that are left out in turn to judge what the others taught."""

LOCAL = ((0.0, 0.3, 0.08), (0.15, 0.3, 0.08), (0.15, 0.4, 0.05), (0.3, 0.2, 0.12), (0.4, 0.1, 0.15))
"""Candidates for (share of the sample covariance, share of the stationary one, reach of the rest as a share of a side)."""

COPIES, STRENGTH = 6, 0.3
"""Variations of every auxiliary image that are learnt from beside it, and how strong they are."""

REACH = 0.125
"""Distance, as a share of a side, over which the correlations of the stationary covariance fall to 1/e."""


@dataclass(frozen=True)
class GaussianPrior:
    """Normal images: (C, *spatial) by channels that are mixed so that they do not correlate.

    mean: (C, D). mixing: (C, C), orthogonal; a mixed channel is mixing @ channels. axes: (C, D, k), orthonormal columns.
    variances: (C, k) along them. rest: (C,), variance in all other directions.
    """

    shape: tuple[int, ...]
    mean: Tensor
    mixing: Tensor
    axes: Tensor
    variances: Tensor
    rest: Tensor

    def to(self, like: Tensor) -> GaussianPrior:
        """In the precision and on the device of a tensor."""
        parts = (self.mean, self.mixing, self.axes, self.variances, self.rest)
        return GaussianPrior(self.shape, *(part.to(like) for part in parts))

    def mixed(self, images: Tensor) -> Tensor:
        """Flat images (A, C * D) as mixed channels (A, C, D)."""
        return torch.einsum("ij,ajd->aid", self.mixing, images.reshape(len(images), *self.mean.shape))

    def flat(self, mixed: Tensor) -> Tensor:
        """The reverse."""
        return torch.einsum("ij,aid->ajd", self.mixing, mixed).flatten(1)

    def coordinates(self, mixed: Tensor) -> Tensor:
        """Mixed channels (A, C, D) along the axes: (A, C, k)."""
        return torch.einsum("acd,cdk->ack", mixed, self.axes)

    def scaled(self, images: Tensor, along: Tensor, otherwise: Tensor) -> Tensor:
        """The matrix with eigenvalues `along` (A or 1, C, k) along the axes and `otherwise` (A or 1, C) times images."""
        mixed = self.mixed(images)
        inside = self.coordinates(mixed)
        result = otherwise[..., None] * mixed
        result = result + torch.einsum("ack,cdk->acd", (along - otherwise[..., None]) * inside, self.axes)
        return self.flat(result)

    def precision(self, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the inverse covariance; `noise` (A,): of the images once seen under white noise so strong."""
        along, otherwise = 1.0 / self.variances[None], 1.0 / self.rest[None]
        if noise is None:
            return along, otherwise
        more = 1.0 / noise.square()
        return along + more[:, None, None], otherwise + more[:, None]


def principal_components(images: Tensor, components: int) -> GaussianPrior:
    """The first principal components of images (M, C, *spatial), all channels together, and one variance for the rest.

    The rest's variance is that of images that were left out of learning the components. At most M / 2 components.
    """
    flat = images.double().flatten(1)
    count = max(1, min(components, len(flat) // 2))
    left_out = []
    for learnt, held in _folds(flat):
        mean, axes, _ = _components(learnt, min(count, len(learnt) - 1))
        apart = held - mean
        left_out.append((apart - (apart @ axes) @ axes.T).square().mean())
    mean, axes, variances = _components(flat, count)
    rest = torch.stack(left_out).mean().clamp_min(FLOOR)
    shape = tuple(images.shape[1:])
    one = torch.ones(1, 1, dtype=torch.float64)
    return GaussianPrior(shape, mean[None], one, axes[None], variances[None].clamp_min(FLOOR), rest[None])


def localized(images: Tensor) -> GaussianPrior:
    """A full covariance of images (M, C, *spatial), as far as so few of them can tell.

    Channels are mixed into their principal ones. For each, the sample covariance is shrunk: towards itself faded out with
    the distance of two pixels, as ensemble Kalman filters do (Houtekamer and Mitchell, Monthly Weather Review 2001), and
    towards a stationary one. How much of each is chosen by the likelihood of images that were left out. Weak variations of
    the images are learnt from, too. Images larger
    than `LARGEST` pixels get principal components.
    """
    shape = tuple(images.shape[1:])
    if prod(shape[1:]) > LARGEST:
        return principal_components(images, len(images) // 2)
    channels = images.double().flatten(2)
    apart = channels - channels.mean(dim=(0, 2), keepdim=True)
    _, mixing = torch.linalg.eigh(torch.einsum("mid,mjd->ij", apart, apart))
    mixed = torch.einsum("ij,nmjd->nmid", mixing.T, _with_variations(images))
    distances = _distances(shape[1:])
    side = max(shape[1:])
    axes, variances, means = [], [], []
    for channel in range(shape[0]):
        own = mixed[:, :, channel]
        chosen = max(LOCAL, key=lambda one: _held_out(own, distances / side, one))
        values, vectors = torch.linalg.eigh(_covariance(own.flatten(0, 1), distances / side, chosen))
        axes.append(vectors)
        variances.append(values.clamp_min(FLOOR))
        means.append(own.mean(dim=(0, 1)))
    rest = torch.stack([one.min() for one in variances])
    return GaussianPrior(shape, torch.stack(means), mixing.T, torch.stack(axes), torch.stack(variances), rest)


def _components(flat: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), axes (D, count) and variances (count,) of rows."""
    mean = flat.mean(dim=0)
    _, values, axes = torch.linalg.svd(flat - mean, full_matrices=False)
    return mean, axes[:count].T, values[:count].square() / max(1, len(flat) - 1)


def _covariance(rows: Tensor, distances: Tensor, shares: tuple[float, float, float]) -> Tensor:
    """The shrunk covariance of rows (M, D), pixels so far apart (D, D)."""
    sample, stationary, reach = shares
    apart = rows - rows.mean(dim=0)
    found = apart.T @ apart / max(1, len(rows) - 1)
    kept = sample + (1.0 - sample - stationary) * torch.exp(-0.5 * (distances / reach).square())
    level = stationary * found.diagonal().mean()
    return found * kept + level * torch.exp(-distances / REACH) + FLOOR * torch.eye(len(found), dtype=found.dtype)


def _with_variations(images: Tensor) -> Tensor:
    """Images (M, C, *spatial) and their variations, flat: (1 + COPIES, M, C, D), always the same."""
    generator = torch.Generator().manual_seed(0)
    copies = [varied(images, generator, STRENGTH) for _ in range(COPIES if images.ndim in (4, 5) else 0)]
    return torch.stack([images, *copies]).double().flatten(3)


def _held_out(copies: Tensor, distances: Tensor, shares: tuple[float, float, float]) -> float:
    """Log likelihood of the images that were left out, over all folds. copies: images in front, then variations."""
    total = 0.0
    for places, left_out in _folds(torch.arange(copies.shape[1])):
        learnt, held = copies[:, places].flatten(0, 1), copies[0, left_out]
        factor = torch.linalg.cholesky(_covariance(learnt, distances, shares))
        white = torch.linalg.solve_triangular(factor, (held - learnt.mean(dim=0)).T, upper=False)
        total += float(-0.5 * white.square().sum() - len(held) * factor.diagonal().log().sum())
    return total


def _folds(rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(learnt from, left out), every row left out once."""
    places = torch.arange(len(rows)) % FOLDS
    return [(rows[places != fold], rows[places == fold]) for fold in range(FOLDS)]


def _distances(sides: Sequence[int]) -> Tensor:
    """Distances between all pixels (D, D) of images with these sides, in pixels."""
    grids = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in sides), indexing="ij")
    places = torch.stack([grid.flatten() for grid in grids], dim=1)
    return torch.cdist(places, places)

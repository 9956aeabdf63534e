"""Mixtures of a few images taken apart: which images, and how much of each is in every mixture?"""

from __future__ import annotations

import torch
from torch import Tensor

from medpfl.attacks.matching.priors import smooth
from medpfl.core.mechanisms import Mixtures

RATE = 0.05
"""Step of the decoding, in pixels and in logits of weights."""

NEAR = 0.1
"""Share of the mean squared distance between mixtures and starting images at which a weight has fallen to 1 / e."""


def extreme(mixtures: Tensor, count: int) -> Tensor:
    """Places (count,) of mixtures (M, pixels) that no weights make of the others: the corners of what they span.

    Successive projection (Araujo et al. 2001; Gillis and Vavasis, PAMI 2014, algorithm 1): the longest one, then the longest of what is
    left orthogonal to it, and so on. Where each image is among the mixtures unmixed, these are found exactly.

    >>> pure = torch.eye(3)
    >>> extreme(torch.stack([0.5 * pure[0] + 0.5 * pure[1], pure[2], pure[0], pure[1]]), 3).sort().values.tolist()
    [1, 2, 3]
    """
    left = torch.cat([mixtures.double(), torch.ones(len(mixtures), 1, dtype=torch.float64)], dim=1)
    places: list[int] = []
    for _ in range(count):
        lengths = left.square().sum(dim=1)
        lengths[places] = -1.0
        place = int(lengths.argmax())
        places.append(place)
        along = left[place] / left[place].norm().clamp_min(1e-12)
        left = left - (left @ along)[:, None] * along
    return torch.tensor(places)


def taken_apart(
    mixtures: Tensor,
    known: Mixtures,
    count: int,
    steps: int,
    variation: float,
    generator: torch.Generator,
    typical: Tensor | None = None,
) -> tuple[Tensor, Tensor, float]:
    """`count` images (N, C, *spatial) in [0, 1], weights (M, N) and the mean squared error left, of M mixtures.

    Of one round (M = N) images start as the mixtures themselves, of several as the most extreme ones. Where signs are
    random, every pixel is turned to the side of middle grey on which it is in a `typical` image (C, *spatial), to the
    brighter side without one. Weights start with more on the images that a mixture is near to.
    """
    seen = mixtures.detach().double()
    if known.signs:
        seen = (2.0 * seen - 1.0).abs()
    places = torch.arange(count) if len(seen) == count else extreme(seen.flatten(1), count)
    corners = seen[places]
    sides = torch.ones_like(seen[0]) if typical is None else torch.where(typical.to(seen) < 0.5, -1.0, 1.0)
    start = (0.5 + 0.5 * sides * corners if known.signs else corners).clamp(0.02, 0.98)
    images = torch.logit(start).requires_grad_()
    noise = 0.1 * torch.randn(len(seen), count, dtype=torch.float64, generator=generator)
    logits = (noise + _nearness(seen, corners)).requires_grad_()
    prior = smooth(variation)
    optimizer = torch.optim.Adam([images, logits], lr=RATE)
    error = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        pictures = images.sigmoid()
        made = torch.einsum("ij,j...->i...", logits.softmax(dim=1), pictures)
        made = (2.0 * made - 1.0).abs() if known.signs else made
        error = (made - seen).square().mean()
        (error + 0.1 * prior(pictures)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return images.sigmoid().detach().to(mixtures), logits.softmax(dim=1).detach().to(mixtures), float(error.detach())


def _nearness(seen: Tensor, corners: Tensor) -> Tensor:
    """Logits (M, N) of the weights that a search starts with."""
    if len(seen) == len(corners):
        return torch.eye(len(seen), dtype=torch.float64)
    apart = torch.cdist(seen.flatten(1), corners.flatten(1)).square()
    return -apart / (NEAR * 10.0 * apart.mean().clamp_min(1e-12))

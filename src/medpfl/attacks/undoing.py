"""Operations on images undone: the likeliest image that known operations turn into the one that was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from medpfl.attacks.matching.learnt.gaussian import GaussianPrior, localized
from medpfl.core.functional import total_variation
from medpfl.defenses.augmentations import OPERATIONS

Operations = tuple[tuple[str, float], ...]
"""Names and strengths, in the order in which a client applies them."""

LEFT = 0.02
"""Standard deviation of what the changed image that was found may be off by."""

USUAL_VARIATION = 0.1
"""Total variation that images are taken to have where no auxiliary ones tell."""

RATE = 0.05
"""Step of Adam, in standard deviations of the prior."""


def undone(
    images: Tensor, sequences: Sequence[Operations], owned: Tensor | None, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The images (N, C, height, width) before the likeliest of the sequences, its place (N,) and the energy (N, sequences).

    For every sequence T the image x is searched that minimizes |T(x) - found|^2 / (2 LEFT^2) - log p(x), and the sequence
    with the lowest is kept. p is normal with the covariance of `owned` images; total variation where there are none.
    """
    prior = None if owned is None else localized(owned).to(images.double())
    searched = [_searched(images.double(), sequence, prior, steps) for sequence in sequences]
    energies = torch.stack([energy for _, energy in searched], dim=1)
    places = energies.argmin(dim=1)
    found = torch.stack([one for one, _ in searched])[places, torch.arange(len(images))]
    return found.to(images), places, energies


def _searched(images: Tensor, sequence: Operations, prior: GaussianPrior | None, steps: int) -> tuple[Tensor, Tensor]:
    """One image for each, and its energy."""
    picture, energy = _from_prior(images, prior) if prior is not None else _from_variation(images)
    points = torch.zeros_like(images.flatten(1)).requires_grad_()
    optimizer = torch.optim.Adam([points], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        _energy(images, picture(points), sequence, energy(points)).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = picture(points)
        return found.clamp(0.0, 1.0), _energy(images, found, sequence, energy(points))


def _energy(images: Tensor, found: Tensor, sequence: Operations, prior: Tensor) -> Tensor:
    apart = changed(found, sequence) - images
    outside = (found - found.clamp(0.0, 1.0)).square()
    return (apart.square() + outside).flatten(1).sum(dim=1) / (2 * LEFT**2) + prior


def _from_prior(images: Tensor, prior: GaussianPrior) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Images of points in units of the prior, and their negative log density."""
    mean = prior.flat(prior.mean[None])
    along, rest = prior.variances.sqrt()[None], prior.rest.sqrt()[None]

    def picture(points: Tensor) -> Tensor:
        return (mean + prior.scaled(points, along, rest)).reshape(images.shape)

    return picture, lambda points: 0.5 * points.square().sum(dim=1)


def _from_variation(images: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Images of points around middle gray, and how much they vary, in nats."""
    pixels = images[0].numel()

    def picture(points: Tensor) -> Tensor:
        return (0.5 + points).reshape(images.shape)

    return picture, lambda points: pixels / USUAL_VARIATION * total_variation(picture(points))


def changed(images: Tensor, sequence: Operations) -> Tensor:
    """The images after the operations; steps of rounding and cuts at 0 and 1 are passed by derivatives as if they were not.

    >>> changed(torch.full((1, 1, 2, 2), 0.2), (("invert", 1.0),)).unique()
    tensor([0.8000])
    """
    for name, strength in sequence:
        made = OPERATIONS[name](images, strength)
        if name == "posterize":
            made = images + (made - images).detach()
        images = made + (made.clamp(0.0, 1.0) - made).detach()
    return images

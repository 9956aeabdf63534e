"""Rigid translation between images: found by phase correlation, to fractions of a pixel, and undone.

Yin et al. register candidates with a flow network; a translation is the part of that which needs no training, is the
same in two and three dimensions, and is stated by one vector per image.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_SHIFT = 0.25
"""Translations are sought up to this share of the size along each axis."""

LOOKS = 3
"""Estimates of one translation, each of what the ones before left."""

WHITENING = 0.1
"""Frequencies weaker than about this share of the strongest count less than equally: they are mostly noise."""


def registered(images: Tensor, references: Tensor) -> Tensor:
    """The images (B, C, *spatial), each translated onto its reference where that brings it closer in squared error.

    What moves in from outside is the nearest edge's value.
    """
    moved = translate(images, translations(images, references))
    before, after = ((one - references).square().flatten(1).sum(dim=1) for one in (images, moved))
    closer = (after < before).reshape(-1, *(1 for _ in images.shape[1:]))
    return torch.where(closer, moved, images)


def translations(images: Tensor, references: Tensor) -> Tensor:
    """The translation (B, axes) in pixels that takes each image (B, C, *spatial) onto its reference.

    What is left after a first estimate is estimated again, `LOOKS` times in all: fading out the edges holds the first
    one back. No estimate goes beyond `LARGEST_SHIFT`.
    """
    sizes = images.new_tensor(list(images.shape[2:]), dtype=torch.float64)
    found = torch.zeros((len(images), len(sizes)), dtype=torch.float64, device=images.device)
    for _ in range(LOOKS):
        found = found + _phase_correlation(translate(images, found), references)
        found = torch.minimum(torch.maximum(found, -LARGEST_SHIFT * sizes), LARGEST_SHIFT * sizes)
    return found


def _phase_correlation(images: Tensor, references: Tensor) -> Tensor:
    """The peak of the whitened cross-correlation, all channels together, within `LARGEST_SHIFT`: (B, axes).

    Along each axis a parabola through the peak and its neighbors gives the fraction of a pixel.
    """
    axes, sizes = tuple(range(2, images.ndim)), images.shape[2:]
    ours, theirs = (torch.fft.fftn(_windowed(one.double()), dim=axes) for one in (images, references))
    cross = (theirs * ours.conj()).sum(dim=1)
    strength = cross.abs()
    floor = WHITENING * strength.flatten(1).amax(dim=1).reshape(-1, *(1 for _ in sizes))
    surface = torch.fft.ifftn(cross / (strength + floor).clamp_min(1e-300), dim=tuple(a - 1 for a in axes)).real
    allowed = torch.ones(sizes, dtype=torch.bool, device=images.device)
    offsets = [_signed(size, images.device) for size in sizes]
    for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        inside = offset.abs() <= LARGEST_SHIFT * size
        allowed = allowed & inside.reshape([-1 if other == axis else 1 for other in range(len(sizes))])
    peaks = surface.masked_fill(~allowed, -torch.inf).flatten(1).argmax(dim=1)
    places = torch.stack(torch.unravel_index(peaks, sizes), dim=1)
    return torch.stack(
        [offset[places[:, axis]] + _fraction(surface, places, axis) for axis, offset in enumerate(offsets)], dim=1
    )


def translate(images: Tensor, shifts: Tensor) -> Tensor:
    """Images (B, C, *spatial) moved by `shifts` (B, axes) pixels, interpolated linearly along each axis.

    >>> translate(torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([[0.5]])).tolist()
    [[[1.0, 1.5, 3.0]]]
    """
    for axis in range(shifts.shape[1]):
        size = images.shape[2 + axis]
        whole = shifts[:, axis].floor()
        share = (shifts[:, axis] - whole).to(images.dtype).reshape(-1, *(1 for _ in images.shape[1:]))
        sources = torch.arange(size, device=images.device) - whole[:, None].long()
        near, far = (_taken(images, (sources - step).clamp(0, size - 1), 2 + axis) for step in (0, 1))
        images = (1 - share) * near + share * far
    return images


def _taken(images: Tensor, places: Tensor, axis: int) -> Tensor:
    """For every image its entries at `places` (B, size) along an axis."""
    shape = [len(images), *(1 for _ in images.shape[1:])]
    shape[axis] = -1
    return images.gather(axis, places.reshape(shape).expand(images.shape))


def _windowed(images: Tensor) -> Tensor:
    """Images without their mean, faded out towards the edges, which do not continue on the other side."""
    images = images - images.flatten(1).mean(dim=1).reshape(-1, *(1 for _ in images.shape[1:]))
    for axis in range(2, images.ndim):
        window = torch.hann_window(images.shape[axis] + 1, periodic=False, dtype=images.dtype, device=images.device)
        middle = 0.5 * (window[1:] + window[:-1])
        images = images * middle.reshape([-1 if other == axis else 1 for other in range(images.ndim)])
    return images


def _signed(size: int, device: torch.device) -> Tensor:
    """Offsets that the places of a circular correlation stand for: 0, 1, ..., -2, -1."""
    places = torch.arange(size, device=device)
    return torch.where(places > size // 2, places - size, places).double()


def _fraction(surface: Tensor, places: Tensor, axis: int) -> Tensor:
    """How far the top of a parabola through peak and neighbors lies from the peak, in [-0.5, 0.5]."""
    rows, size = torch.arange(len(surface), device=surface.device), surface.shape[1 + axis]

    def at(step: int) -> Tensor:
        moved = places.clone()
        moved[:, axis] = (moved[:, axis] + step) % size
        return surface[(rows, *moved.unbind(dim=1))]

    before, peak, after = at(-1), at(0), at(1)
    bend = before - 2 * peak + after
    return torch.where(bend < 0, 0.5 * (before - after) / bend, 0.0).clamp(-0.5, 0.5)

"""Which images activated each unit of a dense layer, and which of them can only be of one client."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_ACTIVE = 20
"""Units that more images activated are left alone."""

SMALLEST = 2e-3
"""Parts of a unit's gradient below this share of its largest one are taken for nothing."""


@dataclass(frozen=True)
class Active:
    """The images (indices) that activated a unit at some time of the round: before any local step, and only later."""

    unit: int
    before: frozenset[int]
    newly: frozenset[int]


def active_images(
    weight: Tensor, bias: Tensor, inputs: Tensor, before: Tensor, tolerance: float, floor: float
) -> list[Active]:
    """The units whose gradients (m, D) and (m,) are explained by few of the images, with these images.

    inputs: (K, D), what the layer sees of each image. before: (K, m), the images' values in the units with the weights
    that were sent; images within rounding of zero there explain nothing. A unit is explained if no other combination
    of fewer images and none with more than the relative residual `tolerance` is needed. Units below `floor` are idle.
    """
    atoms = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
    seen = torch.cat([weight, bias[:, None]], dim=1)
    products, shown = atoms @ atoms.T, seen @ atoms.T
    parts = torch.linalg.lstsq(atoms.T, seen.T, driver="gelsd").solution.T
    found = []
    for unit in (bias.abs() > floor).nonzero().flatten().tolist():
        held = _fewest(products, shown[unit], float(seen[unit].square().sum()), parts[unit], tolerance)
        if held is None or bool((before[list(held), unit].abs() <= tolerance * before.abs().max() * 1e-2).any()):
            continue
        first = frozenset(image for image in held if before[image, unit] > 0)
        found.append(Active(unit, first, frozenset(held) - first))
    return found


def _fewest(products: Tensor, shown: Tensor, size: float, parts: Tensor, tolerance: float) -> list[int] | None:
    """The fewest images whose combination is a unit's gradient, smallest parts left out first; None if there are none."""
    held: list[int] = (parts.abs() >= SMALLEST * parts.abs().max()).nonzero().flatten().tolist()
    explained: list[int] | None = None
    while held and len(held) <= MOST_ACTIVE:
        own = torch.linalg.lstsq(products[held][:, held], shown[held, None], driver="gelsd").solution[:, 0]
        left = size - float(2 * own @ shown[held] - own @ products[held][:, held] @ own)
        if left > tolerance**2 * size:
            break
        explained = held
        held = [image for image, part in zip(held, own.tolist(), strict=True) if abs(part) > float(own.abs().min())]
    return explained


def of_one_client(active: Sequence[Active], images: int) -> list[set[int]]:
    """Groups of at least two images that are of one client each, largest first.

    A client's own local steps alone change what its images activate. Where all images that activated a unit before the
    round are of one client, those that did so only later are of this client too.
    """
    groups = [{image} for image in range(images)]
    grown = True
    while grown:
        grown = False
        for one in active:
            holder = next((group for group in groups if one.before and one.before <= group), None)
            if holder is not None and not one.newly <= holder:
                joined = [group for group in groups if group is holder or group & one.newly]
                groups = [group for group in groups if group not in joined] + [set().union(*joined)]
                grown = True
    return sorted((group for group in groups if len(group) > 1), key=lambda group: (-len(group), min(group)))


def numbered(groups: Iterable[set[int]], images: int) -> Tensor:
    """The number of each image's group (images,), -1 where it is in none.

    >>> numbered([{0, 2}], 4).tolist()
    [0, -1, 0, -1]
    """
    numbers = torch.full((images,), -1)
    for number, group in enumerate(groups):
        numbers[sorted(group)] = number
    return numbers

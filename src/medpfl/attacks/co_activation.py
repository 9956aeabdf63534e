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

ROUNDING = 1e-6
"""Values in a unit below this share of the largest one may be of either sign."""


@dataclass(frozen=True)
class Active:
    """The images (indices) that activated a unit at some time of the round: before any local step, and only later."""

    unit: int
    before: frozenset[int]
    newly: frozenset[int]


def active_images(
    weight: Tensor, bias: Tensor, inputs: Tensor, before: Tensor, expected: Tensor, tolerance: float, drift: float
) -> list[Active]:
    """The units whose gradients (m, D) and (m,) are explained by few of the images, with these images.

    inputs: (K, D), what the layer sees of each image. before: (K, m), the images' values in the units with the weights
    that were sent. expected: (K, m), what each image adds to a unit's bias gradient if it activates the unit. A unit is
    explained by the fewest images whose combination is its gradient up to the relative residual `tolerance`, if what
    each adds is what is expected up to the relative `drift`, or anything below it where the image became active only
    later. Units in which one of them is at zero up to rounding tell nothing.
    """
    atoms = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
    seen = torch.cat([weight, bias[:, None]], dim=1)
    products, shown = atoms @ atoms.T, seen @ atoms.T
    parts = torch.linalg.lstsq(atoms.T, seen.T, driver="gelsd").solution.T
    near = ROUNDING * float(before.abs().max())
    found = []
    for unit in range(len(bias)):
        size = float(seen[unit].square().sum())
        held = _fewest(products, shown[unit], size, parts[unit], tolerance) if size else {}
        images = list(held)
        values = before[images, unit]
        shares = torch.tensor(list(held.values()), dtype=torch.float64) / expected[images, unit]
        likely = (shares > torch.where(values > 0, 1 - drift, 0.0)) & (shares < 1 + drift) & (values.abs() > near)
        if images and bool(likely.all()):
            first = frozenset(image for image, value in zip(images, values.tolist(), strict=True) if value > 0)
            found.append(Active(unit, first, frozenset(images) - first))
    return found


def _fewest(products: Tensor, shown: Tensor, size: float, parts: Tensor, tolerance: float) -> dict[int, float]:
    """The fewest images whose combination is a unit's gradient, with what each adds, smallest parts left out first."""
    held: list[int] = (parts.abs() >= SMALLEST * parts.abs().max()).nonzero().flatten().tolist()
    explained: dict[int, float] = {}
    while held and len(held) <= MOST_ACTIVE:
        own = torch.linalg.lstsq(products[held][:, held], shown[held, None], driver="gelsd").solution[:, 0]
        left = size - float(2 * own @ shown[held] - own @ products[held][:, held] @ own)
        if left > tolerance**2 * size:
            break
        explained = dict(zip(held, own.tolist(), strict=True))
        held = [image for image, part in explained.items() if abs(part) > float(own.abs().min())]
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

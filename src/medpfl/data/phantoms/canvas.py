"""Soft shapes and smooth noise on a grid whose coordinates run from -1 to 1, y downwards.

Everything random is drawn independently of the resolution, so one seed gives one anatomy at any size. Fine grain is
the exception: it is drawn at the resolution of the image, as a scanner's noise would be, and after everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

Field = NDArray[np.float64]

_CELLS = 33


@dataclass(frozen=True)
class Canvas:
    """A square grid of `resolution` pixels per axis, moved, turned and scaled."""

    resolution: int
    center: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0
    scale: float = 1.0

    @cached_property
    def xy(self) -> tuple[Field, Field]:
        """Coordinates of the pixel centers in the moved system."""
        line = (np.arange(self.resolution) + 0.5) / self.resolution * 2 - 1
        x, y = np.meshgrid((line - self.center[0]) / self.scale, (line - self.center[1]) / self.scale)
        cosine, sine = np.cos(self.angle), np.sin(self.angle)
        return cosine * x + sine * y, cosine * y - sine * x

    def soft(self, distance: Field, softness: float = 0.0) -> Field:
        """1 where `distance` is negative, 0 where it is positive, with an edge of at least one pixel."""
        width = max(2.0 / self.resolution / self.scale, softness)
        return np.clip(0.5 - distance / width, 0.0, 1.0)

    def ellipse(
        self,
        x: float,
        y: float,
        a: float,
        b: float,
        angle: float = 0.0,
        softness: float = 0.0,
        warp: Field | float = 0.0,
    ) -> Field:
        """A filled ellipse with half axes `a` and `b`; `warp` moves its border outwards, in units of its size."""
        return self.soft((self.radius(x, y, a, b, angle) - 1.0 - warp) * min(a, b), softness)

    def radius(self, x: float, y: float, a: float, b: float, angle: float = 0.0) -> Field:
        """Distance from the center of an ellipse, 1 on its border."""
        dx, dy = self.xy[0] - x, self.xy[1] - y
        cosine, sine = np.cos(angle), np.sin(angle)
        return np.asarray(np.hypot((cosine * dx + sine * dy) / a, (cosine * dy - sine * dx) / b))

    def noise(self, random: Generator, frequency: float) -> Field:
        """Smooth noise in about [-1, 1] with `frequency` hills along the image."""
        values = random.uniform(-1.0, 1.0, (_CELLS, _CELLS))
        x, y = (axis * frequency / 2 + (_CELLS - 1) / 2 for axis in self.xy)
        return np.asarray(map_coordinates(values, [y, x], order=3, mode="grid-wrap"), dtype=np.float64)

    def grain(self, random: Generator, amount: float) -> Field:
        """Independent normal noise per pixel."""
        return random.normal(0.0, amount, (self.resolution, self.resolution))


@dataclass(frozen=True)
class Drawing:
    """A picture (height, width) or (height, width, 3) in [0, 1], and the region to segment, bool (height, width)."""

    picture: Field
    region: NDArray[np.bool_]


def inside(share: Field) -> NDArray[np.bool_]:
    """The pixels of which a shape covers more than half."""
    return share > 0.5


def over(image: Field, mask: Field, value: Field | float) -> Field:
    """Paints `value` where `mask` is 1."""
    return image + mask * (value - image)

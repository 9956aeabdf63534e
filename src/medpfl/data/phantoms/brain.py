"""Axial brain MRI: scalp, skull, cortex, white matter, ventricles, and a tumor by class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from medpfl.data.phantoms.canvas import Canvas, Drawing, Field, inside, over

BRAIN_CLASSES = ("glioma", "meningioma", "no_tumor", "pituitary")


@dataclass(frozen=True)
class _Weighting:
    """Brightness of tissues in one kind of sequence."""

    scalp: float
    fluid: float
    gray: float
    white: float
    tumor: float
    edema: float


_WEIGHTINGS = (
    _Weighting(scalp=0.85, fluid=0.08, gray=0.38, white=0.58, tumor=0.95, edema=0.30),  # T1 with contrast
    _Weighting(scalp=0.55, fluid=0.98, gray=0.55, white=0.30, tumor=0.75, edema=0.85),  # T2
    _Weighting(scalp=0.45, fluid=0.05, gray=0.55, white=0.40, tumor=0.85, edema=0.75),  # FLAIR
)


def draw_brain(label: int, resolution: int, patient: Generator, image: Generator) -> Drawing:
    """One slice (resolution, resolution) and its tumor. `patient` draws head and tumor, `image` pose and sequence."""
    width, height = patient.uniform(0.58, 0.8), patient.uniform(0.78, 0.95)
    canvas = Canvas(
        resolution,
        center=(image.uniform(-0.1, 0.1), image.uniform(-0.06, 0.06)),
        angle=image.normal(0.0, 0.15),
        scale=image.uniform(0.82, 1.05),
    )
    tissue = _WEIGHTINGS[image.integers(len(_WEIGHTINGS))]
    outline = 0.04 * canvas.noise(patient, 2.0)
    brain = canvas.ellipse(0, 0, width * 0.84, height * 0.86, warp=outline)
    picture = 0.02 + (tissue.scalp - 0.02) * canvas.ellipse(0, 0, width, height, warp=outline)
    picture = over(picture, canvas.ellipse(0, 0, width * 0.94, height * 0.95, warp=outline), 0.05)
    picture = over(picture, brain, tissue.fluid)
    picture = over(picture, canvas.ellipse(0, 0, width * 0.81, height * 0.83, warp=outline), tissue.gray)
    picture = _fold(canvas, picture, width, height, tissue, patient)
    picture = _ventricles(canvas, picture, height, tissue, patient, image)
    midline = canvas.soft(np.abs(canvas.xy[0]) - 0.008) * (np.abs(canvas.xy[1]) > height * 0.4)
    picture = over(picture, midline * brain * 0.7, tissue.fluid)
    picture, region = _tumor(canvas, picture, label, width, height, tissue, brain, patient)
    shading = 1.0 + 0.12 * canvas.noise(image, 1.0)
    return Drawing(np.clip(picture * shading + canvas.grain(image, 0.015), 0.0, 1.0), inside(region))


def _fold(canvas: Canvas, picture: Field, width: float, height: float, tissue: _Weighting, random: Generator) -> Field:
    """White matter with a folded border, and furrows filled with fluid."""
    folds = 0.14 * canvas.noise(random, 14.0) + 0.06 * canvas.noise(random, 24.0)
    radius = canvas.radius(0, 0, width * 0.81, height * 0.83)
    furrows = canvas.soft((np.abs(canvas.noise(random, 13.0)) - 0.1) * 0.2) * (radius > 0.74) * (radius < 1.0)
    picture = over(picture, canvas.ellipse(0, 0, width * 0.7, height * 0.72, warp=folds), tissue.white)
    deep = canvas.ellipse(-0.17, 0.02, 0.09, 0.15, 0.3) + canvas.ellipse(0.17, 0.02, 0.09, 0.15, -0.3)
    picture = over(picture, deep, 0.5 * (tissue.gray + tissue.white))
    return over(picture, 0.8 * furrows, tissue.fluid)


def _ventricles(
    canvas: Canvas,
    picture: Field,
    height: float,
    tissue: _Weighting,
    patient: Generator,
    image: Generator,
) -> Field:
    """Two pairs of horns; their size is the patient's, their shape depends on the level of the slice."""
    size, level = patient.uniform(0.6, 1.5), image.uniform(0.0, 1.0)
    for side in (-1, 1):
        front = canvas.ellipse(side * 0.1, -0.2 * height, 0.045 * size, (0.1 + 0.12 * level) * height, side * 0.35)
        back = canvas.ellipse(side * 0.15, 0.27 * height, 0.05 * size, (0.16 - 0.08 * level) * height, -side * 0.45)
        picture = over(picture, np.maximum(front, back), tissue.fluid)
    third = canvas.ellipse(0, 0.02, 0.018 * size, 0.1 * (1 - level) + 0.02)
    return over(picture, third, tissue.fluid)


def _tumor(
    canvas: Canvas,
    picture: Field,
    label: int,
    width: float,
    height: float,
    tissue: _Weighting,
    brain: Field,
    random: Generator,
) -> tuple[Field, Field]:
    """A ragged ring with a dark core and edema, a round mass at the border, a small central mass, or nothing.

    The second field is the mass itself, with its core and without edema.
    """
    direction, size = random.uniform(0, 2 * np.pi), random.uniform(0.12, 0.24)
    ragged = 0.35 * canvas.noise(random, 9.0)
    name = BRAIN_CLASSES[label]
    if name == "glioma":
        x, y = 0.42 * width * np.cos(direction), 0.45 * height * np.sin(direction)
        picture = over(
            picture, 0.8 * brain * canvas.ellipse(x, y, size * 1.7, size * 1.5, direction, 0.1, ragged), tissue.edema
        )
        mass = brain * canvas.ellipse(x, y, size, size * 0.85, direction, 0.02, ragged)
        core = canvas.ellipse(x, y, size * 0.6, size * 0.5, direction, 0.04, ragged)
        return over(over(picture, mass, tissue.tumor), core, 0.15), np.maximum(mass, core)
    if name == "meningioma":
        x, y = 0.68 * width * np.cos(direction), 0.7 * height * np.sin(direction)
        mass = brain * canvas.ellipse(x, y, size, size, 0.0, 0.02, 0.2 * ragged)
        return over(picture, mass, tissue.tumor), mass
    if name == "pituitary":
        x, y = random.uniform(-0.04, 0.04), random.uniform(-0.05, 0.15)
        mass = canvas.ellipse(x, y, size * 0.6, size * 0.5, 0.0, 0.02, 0.3 * ragged)
        return over(picture, mass, tissue.tumor), mass
    return picture, np.zeros_like(picture)

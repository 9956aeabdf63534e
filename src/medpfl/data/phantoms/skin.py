"""Dermoscopic skin images in color: skin tone, hairs, and a lesion whose irregularity depends on the class."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from medpfl.data.phantoms.canvas import Canvas, Drawing, Field, inside

SKIN_CLASSES = ("benign", "malignant")

_TONES = np.array([[0.93, 0.76, 0.68], [0.86, 0.66, 0.56], [0.78, 0.56, 0.45], [0.62, 0.42, 0.32]])
_PIGMENTS = np.array([[0.55, 0.32, 0.22], [0.42, 0.24, 0.17], [0.26, 0.15, 0.12], [0.35, 0.33, 0.38]])


def draw_skin(label: int, resolution: int, patient: Generator, image: Generator) -> Drawing:
    """One image (resolution, resolution, 3) and its lesion. `patient` draws both, `image` pose and light."""
    malignant = SKIN_CLASSES[label] == "malignant"
    canvas = Canvas(
        resolution,
        center=(image.uniform(-0.25, 0.25), image.uniform(-0.25, 0.25)),
        angle=image.uniform(0, 2 * np.pi),
        scale=image.uniform(0.75, 1.3),
    )
    tone = _TONES[patient.integers(len(_TONES))] + patient.normal(0.0, 0.03, 3)
    pores = 0.02 * canvas.noise(patient, 26.0) + 0.03 * canvas.noise(patient, 3.0)
    picture = tone + pores[..., np.newaxis]
    picture, region = _lesion(canvas, picture, malignant, patient)
    for _ in range(patient.integers(0, 7)):
        picture = _hair(canvas, picture, patient)
    light = 1.0 + 0.1 * canvas.noise(image, 1.0) - 0.1 * np.hypot(*canvas.xy) ** 2 * image.uniform(0, 1)
    light *= image.uniform(0.85, 1.08)
    grain = np.stack([canvas.grain(image, 0.01) for _ in range(3)], axis=-1)
    return Drawing(np.clip(picture * light[..., np.newaxis] + grain, 0.0, 1.0), inside(region))


def _lesion(canvas: Canvas, picture: Field, malignant: bool, random: Generator) -> tuple[Field, Field]:
    """A round spot of one color, or an irregular one of several colors with a veil; and where it is."""
    size, stretch = random.uniform(0.28, 0.5), random.uniform(0.7, 1.0)
    border = (0.45 if malignant else 0.1) * canvas.noise(random, 5.0) + 0.1 * malignant * canvas.noise(random, 12.0)
    edge = random.uniform(0.02, 0.06) if malignant else random.uniform(0.06, 0.2)
    mask = canvas.ellipse(0, 0, size, size * stretch, random.uniform(0, np.pi), edge, border)
    first, second, third = random.permutation(4 if malignant else 3)[:3]
    color = np.broadcast_to(_PIGMENTS[first], picture.shape)
    network = 1.0 + 0.12 * canvas.noise(random, 22.0)
    if malignant:
        for other, frequency in ((second, 4.0), (third, 6.0)):
            share = canvas.soft(0.15 - canvas.noise(random, frequency), 0.3)[..., np.newaxis]
            color = color + share * (_PIGMENTS[other] - color)
    else:
        fade = np.clip(canvas.radius(0, 0, size, size * stretch), 0, 1)[..., np.newaxis] ** 2
        color = color + 0.35 * fade * (picture - color)
    return picture + mask[..., np.newaxis] * (color * network[..., np.newaxis] - picture), mask


def _hair(canvas: Canvas, picture: Field, random: Generator) -> Field:
    """A thin dark curve across the image."""
    x, y = canvas.xy
    angle, offset, bend = random.uniform(0, np.pi), random.uniform(-0.8, 0.8), random.normal(0.0, 0.3)
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    strand = canvas.soft(np.abs(across - offset - bend * along**2) - 0.006) * random.uniform(0.4, 0.9)
    return picture * (1.0 - 0.75 * strand[..., np.newaxis])

"""Frontal chest films: body, lungs, ribs, spine, heart, diaphragm, and opacities by class."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from medpfl.data.phantoms.canvas import Canvas, Drawing, Field, inside, over

CHEST_CLASSES = ("covid", "normal", "viral_pneumonia")


def draw_chest(label: int, resolution: int, patient: Generator, image: Generator) -> Drawing:
    """One film (resolution, resolution) and its lungs. `patient` draws body and disease, `image` pose and exposure."""
    width, lung_height = patient.uniform(0.68, 0.9), patient.uniform(0.5, 0.68)
    canvas = Canvas(
        resolution,
        center=(image.uniform(-0.1, 0.1), image.uniform(-0.05, 0.25)),
        angle=image.normal(0.0, 0.06),
        scale=image.uniform(1.1, 1.5),
    )
    x, y = canvas.xy
    neck = np.clip((-y - 0.5) / 0.35, 0.0, 1.0)
    shoulders = canvas.soft(np.abs(x) - (1.15 * width * (1 - neck**2) + 0.3 * neck**2), 0.12)
    picture = 0.04 + (0.62 + 0.1 * canvas.noise(patient, 2.0)) * shoulders
    lungs = _lungs(canvas, width, lung_height, patient)
    picture = over(picture, lungs, 0.2 + 0.05 * canvas.noise(patient, 4.0))
    picture += lungs * _opacities(canvas, label, width, patient)
    picture += _ribs(canvas, width, patient) * shoulders
    heart = canvas.ellipse(
        0.14, 0.24, patient.uniform(0.24, 0.4), patient.uniform(0.26, 0.36), -0.6, 0.1, 0.05 * canvas.noise(patient, 3)
    )
    picture = over(picture, 0.85 * heart, 0.7)
    spine = canvas.soft(np.abs(x) - 0.085, 0.08) * (0.85 + 0.15 * np.cos(y * 2 * np.pi / 0.16))
    picture = over(picture, 0.55 * spine, 0.82)
    picture = over(picture, 0.8 * canvas.soft(np.abs(x) - 0.045, 0.04) * canvas.soft(y + 0.35, 0.2), 0.42)
    exposure = image.uniform(0.75, 1.35)
    shading = 1.0 + 0.08 * canvas.noise(image, 1.0)
    exposed = np.clip(picture * shading, 0.0, 1.0) ** exposure * image.uniform(0.85, 1.0)
    return Drawing(exposed + np.abs(canvas.grain(image, 0.012)), inside(lungs * (1.0 - heart)))


def _lungs(canvas: Canvas, width: float, height: float, random: Generator) -> Field:
    """Two dark fields, narrow at the top, cut by the domes of the diaphragm."""
    x, y = canvas.xy
    lungs = np.zeros_like(x)
    for side in (-1, 1):
        middle = side * width * random.uniform(0.46, 0.52)
        breadth = width * random.uniform(0.34, 0.4)
        tapered = (x - middle + side * 0.12 * (y + 0.2)) / (breadth * np.clip(1.0 + 0.3 * y, 0.55, 1.25))
        field = canvas.soft((np.hypot(tapered, (y + 0.08) / height) - 1.0) * breadth, 0.05)
        dome = random.uniform(0.38, 0.52) + 0.9 * (x - middle) ** 2 - (0.04 if side < 0 else 0.0)
        lungs = np.maximum(lungs, field * canvas.soft(y - dome, 0.03))
    return lungs


def _ribs(canvas: Canvas, width: float, random: Generator) -> Field:
    """Arcs that fall away from the spine, and the two collar bones."""
    x, y = canvas.xy
    slope, spacing, shift = random.uniform(0.25, 0.6), random.uniform(0.15, 0.21), random.uniform(0.0, 0.2)
    reach = np.clip(np.abs(x) / width, 0, 1)
    back = np.cos((y - slope * reach**1.5 + shift) * 2 * np.pi / spacing)
    front = np.cos((y + 0.5 * slope * reach - shift) * 2 * np.pi / (1.25 * spacing))
    inside = canvas.soft(np.abs(x) - 0.95 * width, 0.1) * canvas.soft(np.abs(y + 0.1) - 0.68, 0.15)
    arcs = 0.1 * np.clip(back, 0, 1) ** 2 + 0.05 * np.clip(front, 0, 1) ** 3
    collar = canvas.soft(np.abs(y + 0.62 - 0.12 * (1 - reach) ** 2) - 0.03, 0.02) * (reach > 0.12) * (reach < 0.8)
    return inside * arcs + 0.18 * collar


def _opacities(canvas: Canvas, label: int, width: float, random: Generator) -> Field:
    """Haze at the outer and lower borders of both lungs (covid), patches in one lung (pneumonia), or vessels only."""
    vessels = 0.08 * np.clip(canvas.noise(random, 11.0), 0, 1)
    name = CHEST_CLASSES[label]
    cloud = 0.5 + 0.5 * canvas.noise(random, 7.0)
    haze = np.zeros_like(vessels)
    first = random.choice((-1, 1))
    for count in range(0 if name == "normal" else 5 if name == "covid" else 2):
        side = first if name == "viral_pneumonia" else (-1, 1)[count % 2]
        x = side * width * (random.uniform(0.55, 0.75) if name == "covid" else random.uniform(0.3, 0.55))
        y = random.uniform(0.0, 0.45) if name == "covid" else random.uniform(-0.35, 0.3)
        size = random.uniform(0.12, 0.22) if name == "covid" else random.uniform(0.18, 0.3)
        haze = np.maximum(haze, canvas.ellipse(x, y, size, size * 1.2, softness=0.15, warp=0.4 * (cloud - 0.5)))
    return vessels + haze * (0.2 + 0.25 * cloud)

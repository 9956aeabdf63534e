"""Procedural medical images: drawn from seeds, at any resolution, with classes and patients."""

from __future__ import annotations

from medpfl.data.phantoms.brain import BRAIN_CLASSES, draw_brain
from medpfl.data.phantoms.chest import CHEST_CLASSES, draw_chest
from medpfl.data.phantoms.skin import SKIN_CLASSES, draw_skin

__all__ = ["BRAIN_CLASSES", "CHEST_CLASSES", "SKIN_CLASSES", "draw_brain", "draw_chest", "draw_skin"]

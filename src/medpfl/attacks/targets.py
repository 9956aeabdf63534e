"""What a matching attack takes for the targets that the client trained with: labels, or masks of a segmentation model."""

from __future__ import annotations

from typing import Literal

from medpfl.attacks.labels import why_no_labels
from medpfl.attacks.matching.settings import Labels
from medpfl.core.domain import GlobalModel

Masks = Literal["joint", "given"]
"""Masks are searched with the images, or the true ones are given (an oracle)."""


def target_source(model: GlobalModel, labels: Labels, masks: Masks) -> Labels:
    """Where the targets come from: as `masks` says for a segmentation model, else as `labels` says."""
    if model.task.name != "segmentation":
        return labels
    return "given" if masks == "given" else "soft"


def why_no_targets(model: GlobalModel, examples: int, labels: Labels, masks: Masks) -> str | None:
    """The reason why an attack with these settings has no targets for such a model; None if it has."""
    if model.task.name != "segmentation":
        if masks == "given":
            return "true masks can be given for segmentation models only; this one is trained with labels"
        return why_no_labels(model, examples) if labels == "inferred" else None
    if labels == "given":
        return "a segmentation model is trained with masks, not labels: set labels: inferred and masks: joint or given"
    return None

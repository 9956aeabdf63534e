"""What tells one model from another, so that a resumed audit notices a changed checkpoint or factory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from medpfl.core.domain import GlobalModel
from medpfl.models.probe import probe_images
from medpfl.models.state import fingerprint

TOLERANCE = 1e-4
"""Share of the largest output by which outputs of the same model may differ between processors."""


def identity(model: GlobalModel) -> dict[str, Any]:
    """What to store of a model: a hash of its tensors, and its outputs for two fixed images.

    The outputs tell models apart that have the same tensors and compute something else with them.
    """
    with torch.no_grad():
        output, _ = model.forward(probe_images(model))
    return {"tensors": fingerprint(model), "outputs": output.double().flatten().tolist()}


def is_same(stored: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether two identities are of one model.

    >>> is_same({"tensors": "ab", "outputs": [1.0, -2.0]}, {"tensors": "ab", "outputs": [1.0, -2.00001]})
    True
    >>> is_same({"tensors": "ab", "outputs": [1.0, -2.0]}, {"tensors": "ab", "outputs": [1.0, -2.1]})
    False
    """
    before, now = stored["outputs"], found["outputs"]
    if stored["tensors"] != found["tensors"] or len(before) != len(now):
        return False
    allowed = TOLERANCE * max(map(abs, before), default=0.0)
    return all(abs(a - b) <= allowed for a, b in zip(before, now, strict=True))

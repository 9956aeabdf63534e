"""Matching attacks reconstruct small volumes as they do images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medpfl.attacks import ATTACKS
from medpfl.core.domain import Batch, Observation, Recipe, Reconstruction
from medpfl.core.functional import psnr
from medpfl.core.tasks import SingleLabel
from medpfl.federation.client import client_step
from medpfl.models import build_model


@pytest.mark.parametrize(
    ("name", "attack", "settings", "decibel"),
    [
        ("lenet_dlg", "cpl", {"iterations": 15}, 30.0),
        ("cnn3", "gradinv", {"iterations": 100, "total_variation": 1e-2}, 25.0),
    ],
)
def test_a_volume_comes_back(name: str, attack: str, settings: dict[str, Any], decibel: float, blobs: Any) -> None:
    shape = (1, 12, 11, 13)
    model = build_model(name, image_shape=shape, task=SingleLabel(2), generator=torch.Generator().manual_seed(0))
    volume = blobs(1, shape)
    update, _ = client_step(model, Batch(volume, torch.tensor([1])), Recipe())
    observation = Observation(model, update, Recipe(), "eavesdropper")
    result = ATTACKS[attack].item(**settings).reconstruct([observation], [torch.Generator().manual_seed(0)])[0]
    assert isinstance(result, Reconstruction)
    assert float(psnr(result.images.float(), volume)) > decibel
    assert result.labels is not None
    assert result.labels.tolist() == [1]

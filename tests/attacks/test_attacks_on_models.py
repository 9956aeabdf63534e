"""Every attack on every model of the zoo, on images and on volumes: it works, or refuses with a reason."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from medpfl.attacks import ATTACKS
from medpfl.core.domain import Batch, Observation, Recipe, Reconstruction
from medpfl.core.tasks import SingleLabel
from medpfl.federation.client import client_step
from medpfl.models import MODELS, build_model

MATCHING = {"iterations": 1, "inner_iterations": 1, "restarts": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "april": {},
    "cpl": MATCHING,
    "dlg": {**MATCHING, "output_error": "candidate"},
    "feature_readout": {"iterations": 2},
    "first_layer_readout": {},
    "gradinv": {"iterations": 2, "median_filter_every": 2},
    "gradinversion": {"iterations": 2, "restarts": 2},
    "idlg": {**MATCHING, "output_error": "candidate"},
    "peeling": {},
    "spear": {"draws": 20_000},
}
REFUSED = {
    "april": "does not cut images into patches",
    "first_layer_readout": "no dense layer",
    "peeling": "no dense layer",
    "spear": "no dense layer",
}
"""What attacks that are for some models only say of the others."""

MEANT_FOR = {"april": {"vit", "vit_b16"}}
MONAI = ("densenet121", "efficientnet_b0")
LARGE = ("vit_b16",)
"""`vit` with other numbers; each pass takes seconds."""
VOLUMES = ("cnn3", "cnn_fedavg", "lenet_cpl", "lenet_dlg", "lenet_idlg")


def test_every_attack_is_in_the_table() -> None:
    assert set(SETTINGS) == set(ATTACKS.names())


def check(attack_name: str, model_name: str, shape: tuple[int, ...]) -> None:
    """One image, one quick run."""
    if model_name in MONAI and importlib.util.find_spec("monai") is None:
        pytest.skip("needs the extra medpfl[monai]")
    generator = torch.Generator().manual_seed(0)
    model = build_model(model_name, image_shape=shape, task=SingleLabel(3), generator=generator)
    attack = ATTACKS[attack_name].item(**SETTINGS[attack_name])
    reason = attack.why_not(model, Recipe(), "gradient", 1)
    if attack_name in REFUSED and model_name not in MEANT_FOR.get(attack_name, ()):
        assert reason is not None
        assert REFUSED[attack_name] in reason
        return
    assert reason is None
    images = torch.rand((1, *shape), generator=generator)
    update, _ = client_step(model, Batch(images, torch.tensor([1])), Recipe())
    result = attack.reconstruct([Observation(model, update, Recipe(), "eavesdropper")], [generator])[0]
    assert isinstance(result, Reconstruction), result
    assert result.images.shape == images.shape
    assert bool(torch.isfinite(result.images).all())
    if attack_name in ("idlg", "cpl", "gradinv", "gradinversion"):
        assert result.labels is not None
        assert result.labels.tolist() == [1]


@pytest.mark.parametrize("model", sorted(set(MODELS.names()) - set(LARGE)))
@pytest.mark.parametrize("attack", sorted(SETTINGS))
def test_images(attack: str, model: str) -> None:
    check(attack, model, (1, 32, 32) if model in MONAI else (1, 12, 12))


@pytest.mark.parametrize("model", VOLUMES)
@pytest.mark.parametrize("attack", sorted(SETTINGS))
def test_volumes(attack: str, model: str) -> None:
    check(attack, model, (1, 12, 11, 13))

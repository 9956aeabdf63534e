"""Every attack on every model of the zoo, on images and on volumes: it works, or refuses with a reason."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from medpfl.attacks import ATTACKS
from medpfl.attacks.crafted import CraftedAttack
from medpfl.attacks.gradinv import GradInv
from medpfl.core.domain import Batch, Failure, Knowledge, Observation, Recipe, Reconstruction
from medpfl.core.tasks import Segmentation, SingleLabel, Task
from medpfl.federation.client import client_step
from medpfl.models import MODELS, SEGMENTATION, build_model

MATCHING = {"iterations": 1, "inner_iterations": 1, "restarts": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "april": {},
    "ats_decoding": {"iterations": 2, "undoing_steps": 2},
    "cpl": MATCHING,
    "dlg": {**MATCHING, "output_error": "candidate"},
    "fedavg_inversion": {"iterations": 2},
    "feature_readout": {"iterations": 2},
    "first_layer_readout": {},
    "gradinv": {"iterations": 2, "median_filter_every": 2},
    "gradinversion": {"iterations": 2, "restarts": 2},
    "maximum_a_posteriori": {"iterations": 2, "prior": "none"},
    "mixture_decoding": {"iterations": 2, "decoding_steps": 2},
    "idlg": {**MATCHING, "output_error": "candidate"},
    "peeling": {},
    "spear": {"draws": 20_000},
    "sratta": {},
}
REFUSED = {
    "april": "does not cut images into patches",
    "first_layer_readout": "no dense layer",
    "peeling": "no dense layer",
    "spear": "no dense layer",
    "sratta": "no dense layer",
}
"""What attacks that are for some models only say of the others."""

MEANT_FOR = {"april": {"vit", "vit_b16"}}
REFUSED_FOR_MASKS = {
    "maximum_a_posteriori": "trained with masks",
    "mixture_decoding": "mixtures of masks",
    "ats_decoding": "trained with masks",
    **REFUSED,
    "cpl": "trained with masks",
    "fedavg_inversion": "trained with masks",
    "feature_readout": "no dense layer",
    "idlg": "trained with masks",
}
"""The same of segmentation models."""
MONAI = ("densenet121", "efficientnet_b0", "unet")
LARGE = ("vit_b16",)
"""`vit` with other numbers; each pass takes seconds."""
VOLUMES = ("cnn3", "cnn_fedavg", "lenet_cpl", "lenet_dlg", "lenet_idlg", "unet", "unet_small")


def test_every_attack_is_in_the_table() -> None:
    assert set(SETTINGS) == {name for name in ATTACKS.names() if not issubclass(ATTACKS[name].item, CraftedAttack)}


def check(attack_name: str, model_name: str, shape: tuple[int, ...]) -> None:
    """One image, one quick run."""
    if model_name in MONAI and importlib.util.find_spec("monai") is None:
        pytest.skip("needs the extra medpfl[monai]")
    generator = torch.Generator().manual_seed(0)
    segments = model_name in SEGMENTATION
    task: Task = Segmentation(3) if segments else SingleLabel(3)
    model = build_model(model_name, image_shape=shape, task=task, generator=generator)
    attack = ATTACKS[attack_name].item(**SETTINGS[attack_name])
    reason = attack.why_not(model, Recipe(), "gradient", 1)
    refused = REFUSED_FOR_MASKS if segments else REFUSED
    if attack_name in refused and model_name not in MEANT_FOR.get(attack_name, ()):
        assert reason is not None
        assert refused[attack_name] in reason
        return
    assert reason is None
    images = torch.rand((1, *shape), generator=generator)
    targets = torch.randint(3, (1, *shape[1:]), generator=generator) if segments else torch.tensor([1])
    update, _ = client_step(model, Batch(images, targets), Recipe())
    result = attack.reconstruct([Observation(model, update, Recipe(), "eavesdropper")], [generator])[0]
    assert isinstance(result, Reconstruction), result
    assert result.images.shape == images.shape
    assert bool(torch.isfinite(result.images).all())
    if segments:
        assert result.labels is None
        assert result.masks is not None
        assert result.masks.shape == targets.shape
    elif attack_name in ("idlg", "cpl", "gradinv", "gradinversion"):
        assert result.labels is not None
        assert result.labels.tolist() == [1]


@pytest.mark.parametrize("model", sorted(set(MODELS.names()) - set(LARGE)))
@pytest.mark.parametrize("attack", sorted(SETTINGS))
def test_images(attack: str, model: str) -> None:
    check(attack, model, (1, 32, 32) if model in MONAI else (1, 12, 12))


@pytest.mark.parametrize("model", VOLUMES)
@pytest.mark.parametrize("attack", sorted(SETTINGS))
def test_volumes(attack: str, model: str) -> None:
    check(attack, model, (1, 12, 8, 12) if model in SEGMENTATION else (1, 12, 11, 13))


@pytest.mark.parametrize("attack_name", ["cpl", "dlg", "gradinv", "gradinversion", "idlg"])
def test_true_masks_are_an_oracle_that_segmentation_models_take_and_others_refuse(attack_name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    settings = {**SETTINGS[attack_name], "masks": "given"}
    attack = ATTACKS[attack_name].item(**settings)
    assert attack.requires() == {"masks"}
    model = build_model("unet_small", image_shape=(1, 12, 12), task=Segmentation(2), generator=generator)
    other = build_model("lenet_dlg", image_shape=(1, 12, 12), task=SingleLabel(2), generator=generator)
    assert attack.why_not(model, Recipe(), "gradient", 1) is None
    assert "true masks can be given for segmentation models only" in str(attack.why_not(other, Recipe(), "gradient", 1))
    masks = torch.randint(2, (1, 12, 12), generator=generator)
    update, _ = client_step(model, Batch(torch.rand((1, 1, 12, 12), generator=generator), masks), Recipe())
    seen = Observation(model, update, Recipe(), "eavesdropper", Knowledge(masks=masks))
    result = attack.reconstruct([seen], [generator])[0]
    assert isinstance(result, Reconstruction), result
    assert result.masks is None
    assert result.labels is None
    without = attack.reconstruct([Observation(model, update, Recipe(), "eavesdropper")], [generator])[0]
    assert isinstance(without, Failure)
    assert "masks were not granted" in without.reason


def test_true_labels_mean_nothing_to_a_segmentation_model() -> None:
    generator = torch.Generator().manual_seed(0)
    model = build_model("unet_small", image_shape=(1, 12, 12), task=Segmentation(2), generator=generator)
    reason = GradInv(labels="given").why_not(model, Recipe(), "gradient", 1)
    assert "trained with masks, not labels" in str(reason)

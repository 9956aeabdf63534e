"""That matching really brings images back, in small."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from medpfl.attacks import ATTACKS
from medpfl.attacks.base import Attack
from medpfl.core.domain import Observation, Reconstruction
from medpfl.core.tasks import SingleLabel
from medpfl.models import build_model

Observe = Callable[..., Observation]


def build(name: str, **settings: Any) -> Attack:
    factory: Any = ATTACKS[name].item
    attack: Attack = factory(**settings)
    return attack


def decibels(result: Reconstruction, truth: Tensor) -> float:
    return -10 * math.log10(max(float((result.images - truth).double().square().mean()), 1e-10))


@pytest.fixture
def victims(make_model: Any, sigmoid_lenet: Any, observe: Observe, blobs: Any) -> tuple[list[Observation], Tensor]:
    images = blobs(3, (1, 12, 12))
    model = make_model(sigmoid_lenet(), (1, 12, 12), seed=1)
    return [observe(model, images[row : row + 1], torch.tensor([row])) for row in range(3)], images


@pytest.mark.parametrize("name", ["idlg", "cpl", "dlg"])
def test_images_and_labels_come_back(name: str, victims: tuple[list[Observation], Tensor]) -> None:
    observations, images = victims
    attack = build(name, iterations=40)
    results = attack.reconstruct(observations, [torch.Generator().manual_seed(row) for row in range(3)])
    good = 0
    for row, result in enumerate(results):
        assert isinstance(result, Reconstruction)
        assert result.labels is not None
        good += decibels(result, images[row]) > 30 and result.labels.tolist() == [row]
    assert good == 3


def test_color_comes_back(make_model: Any, sigmoid_lenet: Any, observe: Observe, blobs: Any) -> None:
    images = blobs(1, (3, 12, 12))
    observation = observe(make_model(sigmoid_lenet(3), (3, 12, 12)), images, torch.tensor([1]))
    (result,) = build("cpl", iterations=40).reconstruct([observation], [torch.Generator().manual_seed(0)])
    assert isinstance(result, Reconstruction)
    assert decibels(result, images[0]) > 30


def test_gradinv_beats_a_grey_image(victims: tuple[list[Observation], Tensor]) -> None:
    observations, images = victims
    attack = build("gradinv", iterations=150)
    results = attack.reconstruct(observations, [torch.Generator().manual_seed(row) for row in range(3)])
    for row, result in enumerate(results):
        assert isinstance(result, Reconstruction)
        grey = -10 * math.log10(float((images[row] - 0.5).square().mean()))
        assert decibels(result, images[row]) > grey + 6


@pytest.mark.parametrize("name", ["cpl", "dlg"])
def test_noise_ends_the_search_early_and_says_so(name: str, victims: tuple[list[Observation], Tensor]) -> None:
    observation = victims[0][0]
    generator = torch.Generator().manual_seed(0)
    noisy = {
        key: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for key, tensor in observation.update.trainable.items()
    }
    attack = build(name)
    noisy_one = replace(observation, update=replace(observation.update, trainable=noisy))
    (result,) = attack.reconstruct([noisy_one], [torch.Generator().manual_seed(0)])
    assert isinstance(result, Reconstruction)
    assert "stalled" in result.stop_reason
    assert any("not matched" in note for note in result.notes)
    assert result.gradient_evaluations < 0.6 * attack.evaluations(observation.model, 1)


@pytest.mark.shared_data
def test_brain_slices_come_back_from_the_lenet_of_dlg(shared_data: Path, observe: Observe) -> None:
    paths = [sorted((shared_data / "brain_mri" / name).glob("*.png"))[0] for name in ("meningioma", "no_tumor")]
    pictures = [Image.open(path).convert("L").resize((32, 32), Image.Resampling.LANCZOS) for path in paths]
    images = torch.stack([torch.from_numpy(np.asarray(one, dtype=np.float32) / 255)[None] for one in pictures])
    model = build_model(
        "lenet_dlg", image_shape=(1, 32, 32), task=SingleLabel(4), generator=torch.Generator().manual_seed(0)
    )
    observations = [observe(model, images[row : row + 1], torch.tensor([row + 1])) for row in range(2)]
    generators = [torch.Generator().manual_seed(row) for row in range(2)]
    results = build("cpl", iterations=30, restarts=1).reconstruct(observations, generators)
    for row, result in enumerate(results):
        assert isinstance(result, Reconstruction)
        assert decibels(result, images[row]) > 30

"""U-Nets: shapes, sizes, volumes, determinism, and training with masks."""

from __future__ import annotations

import pytest
import torch

from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.errors import MissingExtra, ModelError
from medpfl.core.tasks import Segmentation, SingleLabel
from medpfl.federation.client import client_step
from medpfl.federation.training import TrainingConfig, train
from medpfl.models import SEGMENTATION, build_model


def build(name: str, shape: tuple[int, ...], classes: int = 2, seed: int = 0) -> GlobalModel:
    """A segmentation model; skips where its extra is not installed."""
    generator = torch.Generator().manual_seed(seed)
    try:
        return build_model(name, image_shape=shape, task=Segmentation(classes), generator=generator)
    except MissingExtra as error:
        pytest.skip(str(error))


def test_the_zoo_has_one_with_monai_and_one_without() -> None:
    assert {"unet", "unet_small"} == SEGMENTATION


@pytest.mark.parametrize("name", sorted(SEGMENTATION))
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 12, 20), (1, 8, 12, 16)])
@pytest.mark.parametrize("classes", [2, 5])
def test_a_score_per_class_and_pixel(name: str, shape: tuple[int, ...], classes: int) -> None:
    output, _ = build(name, shape, classes).forward(torch.rand(3, *shape))
    assert output.shape == (3, classes, *shape[1:])


@pytest.mark.parametrize("name", sorted(SEGMENTATION))
def test_the_generator_decides_all_weights(name: str) -> None:
    first, again, other = (build(name, (1, 8, 8), seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(first.parameters[key], again.parameters[key]) for key in first.parameters)
    assert any(not torch.equal(first.parameters[key], other.parameters[key]) for key in first.parameters)


@pytest.mark.parametrize("name", sorted(SEGMENTATION))
def test_sides_that_cannot_be_halved_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="needs sides that 4 divides"):
        build(name, (1, 32, 30))


def test_a_model_of_the_wrong_kind_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ModelError, match="one output for each of the 2 classes and each pixel"):
        build_model("lenet_dlg", image_shape=(1, 16, 16), task=Segmentation(2), generator=generator)
    with pytest.raises(ModelError, match="one output for each of the 2 classes"):
        build_model("unet_small", image_shape=(1, 16, 16), task=SingleLabel(2), generator=generator)


def test_a_few_steps_find_bright_squares() -> None:
    images, masks = 0.2 * torch.rand(24, 1, 16, 16), torch.zeros(24, 16, 16, dtype=torch.int64)
    for index, (top, left) in enumerate(torch.randint(0, 9, (24, 2)).tolist()):
        images[index, :, top : top + 6, left : left + 6] += 0.7
        masks[index, top : top + 6, left : left + 6] = 1
    config = TrainingConfig(steps=60, batch_size=8, learning_rate=0.01)
    model, _ = train(build("unet_small", (1, 16, 16)), images[:16], masks[:16], config, torch.Generator())
    found = model.forward(images[16:])[0].argmax(dim=1)
    overlap = 2 * (found * masks[16:]).sum() / (found.sum() + masks[16:].sum())
    assert float(overlap) > 0.9


@pytest.mark.parametrize("name", sorted(SEGMENTATION))
def test_clients_update_is_autograds(name: str) -> None:
    model = build(name, (1, 8, 8))
    images, masks = torch.rand(3, 1, 8, 8), torch.randint(2, (3, 8, 8))
    update, _ = client_step(model, Batch(images, masks), Recipe(batch_size=3))
    parameters = {key: tensor.clone().requires_grad_() for key, tensor in model.parameters.items()}
    output = torch.func.functional_call(model.module, parameters, (images,))
    expected = torch.autograd.grad(model.task.loss(output, masks), list(parameters.values()))
    for key, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(update.trainable[key], gradient)

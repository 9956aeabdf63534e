"""GradInversion on batches: what its terms bring, and the data and nets that it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medpfl.attacks.gradinversion import GradInversion
from medpfl.core.domain import Batch, GlobalModel, Observation, Recipe, Reconstruction
from medpfl.core.functional import assignment, psnr
from medpfl.federation.client import client_step


def normed(channels: int, size: int, axes: int = 2, width: int = 12) -> nn.Sequential:
    """A convolution with batch norm and a dense layer, in two or three dimensions."""
    convolution, norm = (nn.Conv2d, nn.BatchNorm2d) if axes == 2 else (nn.Conv3d, nn.BatchNorm3d)
    side = (size + 1) // 2
    return nn.Sequential(
        convolution(channels, width, 3, stride=2, padding=1),
        norm(width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width * side**axes, 3),
    )


def seen(model: GlobalModel, images: Tensor, labels: Tensor, mode: Any = "train") -> Observation:
    recipe = Recipe(batch_size=len(images), batch_norm=mode)
    update, _ = client_step(model, Batch(images, labels), recipe)
    return Observation(model, update, recipe, "honest_server")


def attacked(attack: GradInversion, observation: Observation, seed: int = 0) -> Reconstruction:
    (result,) = attack.reconstruct([observation], [torch.Generator().manual_seed(seed)])
    assert isinstance(result, Reconstruction), result
    return result


def quality(found: Tensor, images: Tensor) -> float:
    """Mean PSNR under the best order."""
    cost = (images.flatten(1)[:, None] - found.flatten(1)[None]).square().sum(dim=2)
    return float(psnr(images, found[assignment(cost)[1]]).mean())


def test_recovered_statistics_help_where_labels_repeat(make_model: Any, blobs: Any) -> None:
    images, labels = blobs(4, (1, 12, 12), seed=3), torch.tensor([0, 0, 1, 0])
    model = make_model(normed(1, 12), (1, 12, 12), uniform=False)
    observation = seen(model, images, labels)
    found = {
        source: attacked(GradInversion(iterations=200, restarts=2, batch_norm_statistics=source), observation)
        for source in ("none", "recovered")
    }
    assert all(one.labels is not None and one.labels.tolist() == [0, 0, 0, 1] for one in found.values())
    without, with_them = (quality(found[source].images, images) for source in ("none", "recovered"))
    assert with_them > without + 1.0
    assert with_them > 20.0


@pytest.mark.parametrize("count", [1, 2, 16])
@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 12, 12), (1, 6, 6, 6)])
def test_batches_of_grey_and_color_images_and_of_volumes(shape: tuple[int, ...], count: int, make_model: Any) -> None:
    axes = len(shape) - 1
    model = make_model(normed(shape[0], shape[1], axes), shape, uniform=False)
    images = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    attack = GradInversion(iterations=40, restarts=2, warm_up=20, learning_rate=0.05)
    result = attacked(attack, seen(model, images, torch.arange(count) % 3))
    assert result.images.shape == images.shape
    assert result.gradient_evaluations == attack.evaluations(model, count)
    assert any("recovered from the buffers" in note for note in result.notes)
    first, last = result.trace[0][1], result.trace[-1][1]
    assert last < first


def test_group_is_left_out_of_a_single_start_and_counts_for_several(make_model: Any, blobs: Any) -> None:
    images, labels = blobs(2, (1, 12, 12)), torch.tensor([0, 1])
    observation = seen(make_model(normed(1, 12), (1, 12, 12), uniform=False), images, labels)
    alone = [attacked(GradInversion(iterations=20, restarts=1, group=weight), observation) for weight in (0.0, 5.0)]
    assert torch.equal(alone[0].images, alone[1].images)
    several = [attacked(GradInversion(iterations=20, restarts=3, group=weight), observation) for weight in (0.0, 5.0)]
    assert not torch.equal(several[0].images, several[1].images)

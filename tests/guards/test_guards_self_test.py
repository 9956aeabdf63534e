"""The read-out self-test against attacks that really read images, and against honest clients that show none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from medpfl.attacks.crafted import ServerView
from medpfl.attacks.front import BIAS, FRONT, WEIGHT
from medpfl.attacks.front import SECOND_WEIGHT as SECOND
from medpfl.attacks.medleak import MedLeak
from medpfl.core.domain import Auxiliary, Batch, GlobalModel, Knowledge, Recipe, Tensors
from medpfl.core.tasks import SingleLabel
from medpfl.data import load_dataset
from medpfl.data.dataset import Dataset
from medpfl.data.readers.phantom import PhantomReader
from medpfl.federation import Plain
from medpfl.federation.client import client_step
from medpfl.guards.self_test import SelfTest, self_test
from medpfl.models import build_model, prepare

Disguise = Callable[[GlobalModel, torch.Generator], GlobalModel]


@pytest.fixture(scope="module")
def phantoms() -> Dataset:
    return load_dataset(PhantomReader(count=400), name="phantoms", size=28, channels=1, aspect="squash")


def held(data: Dataset, count: int) -> Batch:
    return Batch(data.images[:count], data.targets[:count])


def crafted(data: Dataset, bins: int = 256) -> GlobalModel:
    """MedLeak's module in front of a LeNet, at a scale that needs no calibration."""
    model = build_model(
        "lenet_idlg", image_shape=(1, 28, 28), task=data.task, generator=torch.Generator().manual_seed(1)
    )
    attack = MedLeak(bins=bins, queries=1, scale=1e-4)
    view = ServerView(
        model=model,
        recipe=None,
        update="gradient",
        channel=Plain(),
        examples=32,
        threat_model="malicious_server",
        can=attack.needs(),
        knowledge=Knowledge(auxiliary=Auxiliary(data.images[64:], data.targets[64:])),
    )
    return attack.prepare(view, torch.Generator().manual_seed(0)).model(0)


def changed(model: GlobalModel, tensors: Tensors) -> GlobalModel:
    return replace(model, parameters={**model.parameters, **tensors})


def unchanged(model: GlobalModel, generator: torch.Generator) -> GlobalModel:
    return model


def permuted(model: GlobalModel, generator: torch.Generator) -> GlobalModel:
    order = torch.randperm(len(model.parameters[BIAS]), generator=generator)
    return changed(
        model,
        {
            WEIGHT: model.parameters[WEIGHT][order],
            BIAS: model.parameters[BIAS][order],
            SECOND: model.parameters[SECOND][:, order],
        },
    )


def rescaled(model: GlobalModel, generator: torch.Generator) -> GlobalModel:
    """Rows of random positive sizes over eight orders of magnitude, undone in the columns behind them."""
    sizes = 10 ** (8 * torch.rand(len(model.parameters[BIAS]), generator=generator) - 4)
    return changed(
        model,
        {
            WEIGHT: model.parameters[WEIGHT] * sizes[:, None],
            BIAS: model.parameters[BIAS] * sizes,
            SECOND: model.parameters[SECOND] / sizes,
        },
    )


def rank_one(model: GlobalModel, generator: torch.Generator) -> GlobalModel:
    """Columns of random signs and sizes in place of equal ones."""
    sizes = torch.randn(len(model.parameters[BIAS]), generator=generator)
    return changed(model, {SECOND: model.parameters[SECOND] * sizes})


def mirrored(model: GlobalModel, generator: torch.Generator) -> GlobalModel:
    """Every second unit is active for images darker than its edge in place of brighter ones."""
    signs = torch.where(torch.arange(len(model.parameters[BIAS])) % 2 == 0, 1.0, -1.0)
    return changed(
        model,
        {WEIGHT: model.parameters[WEIGHT] * signs[:, None], BIAS: model.parameters[BIAS] * signs},
    )


def everything(model: GlobalModel, generator: torch.Generator) -> GlobalModel:
    for disguise in (rank_one, rescaled, mirrored, permuted):
        model = disguise(model, generator)
    return model


def gradient_of(model: GlobalModel, batch: Batch, batch_norm: str = "eval") -> Tensors:
    recipe = Recipe(batch_size=len(batch), batch_norm=batch_norm)  # type: ignore[arg-type]
    return client_step(model, batch, recipe)[0].trainable


def look(model: GlobalModel, batch: Batch) -> SelfTest:
    return self_test(model, gradient_of(model, batch), batch)


@pytest.mark.parametrize("disguise", [unchanged, permuted, rescaled, rank_one, mirrored, everything])
def test_medleak_is_found_under_every_disguise(phantoms: Dataset, disguise: Disguise) -> None:
    model, batch = crafted(phantoms), held(phantoms, 32)
    edges = -model.parameters[BIAS] / model.parameters[WEIGHT].sum(dim=1)
    bright = batch.images.flatten(1).mean(dim=1)
    bins = torch.bucketize(bright, edges)
    alone = int((torch.bincount(bins)[bins] == 1).sum())
    found = look(disguise(model, torch.Generator().manual_seed(2)), batch)
    assert found.returned >= alone - 1 >= 20
    assert found.worst is not None
    assert (found.worst.layer, found.worst.sees) == (f"{FRONT}.first", "image")
    assert found.worst.chance is not None
    assert found.worst.crossing == 0.0
    assert found.worst.chance.crossing is not None
    assert found.worst.chance.crossing > 0.3


def test_images_that_come_back_are_named_one_by_one(phantoms: Dataset) -> None:
    """Two units, one of which only the brightest image activates: that image and no other comes back."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 2), nn.ReLU(), nn.Linear(2, 4))
    batch = held(phantoms, 8)
    means = batch.images.flatten(1).mean(dim=1)
    first, second = means.topk(2).values.tolist()
    with torch.no_grad():
        layer = module[1]
        assert isinstance(layer, nn.Linear)
        layer.weight.fill_(1 / 784)
        layer.bias.copy_(torch.tensor([1.0, -(first + second) / 2]))
    model = prepare(module, name="two", image_shape=(1, 28, 28), task=SingleLabel(4))
    (finding, _) = look(model, batch).layers
    assert finding.images.tolist() == [int(means.argmax())]
    assert finding.similarity[means.argmax()] > 0.999
    assert finding.psnr[means.argmax()] > 60


@pytest.mark.parametrize("size", [1, 4, 16, 64])
@pytest.mark.parametrize("name", ["lenet_dlg", "lenet_idlg", "lenet_cpl"])
def test_convolutional_nets_show_no_image(phantoms: Dataset, name: str, size: int) -> None:
    model = build_model(name, image_shape=(1, 28, 28), task=phantoms.task, generator=torch.Generator().manual_seed(3))
    found = look(model, held(phantoms, size))
    assert found.returned == 0
    if size == 1:
        assert found.layers[-1].share == 1.0  # what every last layer shows of a single image: its features


def test_a_dense_first_layer_shows_a_single_image_but_few_of_many(phantoms: Dataset) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 4))
    model = prepare(module, name="dense", image_shape=(1, 28, 28), task=SingleLabel(4))
    assert look(model, held(phantoms, 1)).returned == 1
    many = look(model, held(phantoms, 64))
    assert many.returned < 32
    assert many.worst is not None
    assert many.worst.chance is not None
    assert many.worst.excess < 0.1
    assert many.worst.crossing is not None
    assert many.worst.crossing > 0.3


def test_noise_of_a_defense_hides_images(phantoms: Dataset) -> None:
    """What is tested is the update that is sent, not what the client computed before."""
    model, batch = crafted(phantoms), held(phantoms, 16)
    gradient = dict(gradient_of(model, batch))
    size = gradient[WEIGHT].std()
    noisy = {name: tensor + 10 * size * torch.randn_like(tensor) for name, tensor in gradient.items()}
    assert self_test(model, noisy, batch).returned == 0


def test_colors_behind_a_normalization_are_seen_as_images() -> None:
    images = torch.rand(3, 3, 16, 16)
    module = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 2))
    mean, spread = torch.tensor([0.5, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.4])

    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = module

        def forward(self, image: Tensor) -> Tensor:
            result: Tensor = self.net((image - mean[:, None, None]) / spread[:, None, None])
            return result

    model = prepare(Normalized(), name="normalized", image_shape=(3, 16, 16), task=SingleLabel(2))
    found = look(model, Batch(images[:1], torch.tensor([0])))
    assert found.layers[0].sees == "image"
    assert found.returned == 1
    assert float(found.layers[0].psnr) > 50


def test_a_convolution_over_the_whole_image_is_a_dense_layer(phantoms: Dataset) -> None:
    model = crafted(phantoms)
    first = model.parameters[WEIGHT]

    class Disguised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, len(first), 28)
            self.second = nn.Linear(len(first), 784)
            self.last = nn.Linear(784, 4)

        def forward(self, image: Tensor) -> Tensor:
            result: Tensor = self.last(self.second(torch.relu(self.first(image)).flatten(1)))
            return result

    module = Disguised()
    with torch.no_grad():
        module.first.weight.copy_(first.reshape(-1, 1, 28, 28))
        module.first.bias.copy_(model.parameters[BIAS])  # type: ignore[union-attr]
        module.second.weight.copy_(model.parameters[SECOND])
    disguised = prepare(module, name="disguised", image_shape=(1, 28, 28), task=SingleLabel(4))
    found = look(disguised, held(phantoms, 32))
    assert found.returned >= 20
    assert found.layers[0].sees == "image"


def test_what_cannot_be_tested_is_named(phantoms: Dataset) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.rand(784, 4))

        def forward(self, image: Tensor) -> Tensor:
            return image.flatten(1) @ self.matrix

    model = prepare(Own(), name="own", image_shape=(1, 28, 28), task=SingleLabel(4))
    found = look(model, held(phantoms, 2))
    assert found.layers == ()
    assert found.worst is None
    assert found.not_tested == {"matrix": "its layer is neither dense nor a convolution"}


@pytest.mark.parametrize(("between", "sees"), [(nn.Identity(), "image"), (nn.ReLU(), "features")])
def test_images_behind_a_linear_mixture_of_their_pixels_count_as_images(
    phantoms: Dataset, between: nn.Module, sees: str
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=4), between, nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 4)
    )
    model = prepare(net, name="mixed", image_shape=(1, 28, 28), task=phantoms.task)
    batch = held(phantoms, 2)
    update, _ = client_step(model, batch, Recipe(update="gradient", batch_size=2))
    found = self_test(model, update.trainable, batch)
    dense = next(layer for layer in found.layers if layer.layer == "3")
    assert (dense.sees, dense.share) == (sees, 1.0)
    assert found.returned == 2 or sees == "features"

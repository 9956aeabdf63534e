"""Trap weights against what can be read at most: images that are the only ones in some unit, counted from the truth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from crafted_rounds import SGD, Round, attacked, lenet
from torch import Tensor, nn

from medpfl.attacks.crafted import ServerView
from medpfl.attacks.curious_abandon_honesty import CuriousAbandonHonesty
from medpfl.attacks.trap_weights import drawn_traps, readable, with_factor, with_thresholds
from medpfl.core.domain import Failure, GlobalModel, Recipe
from medpfl.core.errors import AttackFailure
from medpfl.core.tasks import MultiLabel, SingleLabel
from medpfl.data.dataset import Dataset
from medpfl.federation import Channel, Plain, SecAggPlus, SecureSum
from medpfl.models import prepare

GRADIENT = Recipe(update="gradient")


def dense(data: Dataset, activation: nn.Module | None = None, units: int = 300) -> GlobalModel:
    """A net that begins with a dense layer."""
    shape = tuple(data.images.shape[1:])
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(torch.Size(shape).numel(), units), activation or nn.ReLU(), nn.Linear(units, 3)]
    return prepare(nn.Sequential(*layers), name="dense", image_shape=shape, task=SingleLabel(3))


def alone_in_a_unit(found: Round, layer: str = "front.first") -> int:
    """How many private images are the only active ones in at least one unit, image by image and unit by unit."""
    parameters = found.observation.model.parameters
    weight, bias = parameters[f"{layer}.weight"].double(), parameters[f"{layer}.bias"].double()
    active = [
        set(torch.nonzero(weight @ image + bias > 0).flatten().tolist()) for image in found.private.double().flatten(1)
    ]
    others = [set().union(*active[:place], *active[place + 1 :]) for place in range(len(active))]
    return sum(bool(mine - rest) for mine, rest in zip(active, others, strict=True))


def natural(count: int) -> Tensor:
    """Color images with the spectrum, mean and contrast of photographs: amplitudes that fall as one over frequency."""
    generator = torch.Generator().manual_seed(0)
    frequency = (torch.fft.fftfreq(32)[:, None].square() + torch.fft.rfftfreq(32)[None].square()).sqrt()
    frequency[0, 0] = 1 / 32
    common = torch.randn(count, 1, 32, 17, generator=generator, dtype=torch.cfloat)
    own = torch.randn(count, 3, 32, 17, generator=generator, dtype=torch.cfloat)
    images: Tensor = torch.fft.irfft2((common + 0.4 * own) / frequency, s=(32, 32))
    images = images / images.std() * 0.25 + 0.47
    return images.clamp(0, 1)


def test_published_traps_give_about_half_of_a_hundred_photographs(skin: Dataset) -> None:
    """Boenisch et al. report more than half of 100 images with 1000 units."""
    images = natural(200)
    data = replace(skin, images=images, targets=torch.arange(200) % 2, masks=None)
    attack = CuriousAbandonHonesty(**CuriousAbandonHonesty.presets["published"])
    assert attack.requires() == frozenset()
    found = attacked(attack, data, 100, recipe=GRADIENT, model=dense(data, units=1000))
    assert 0.4 <= found.recovered / 100 <= 0.9
    assert found.recovered <= alone_in_a_unit(found, "1")


@pytest.mark.parametrize(
    "channel", [Plain(), SecureSum(clients=2), SecAggPlus(clients=2)], ids=["plain", "sum", "secagg"]
)
def test_certified_images_are_those_alone_in_a_unit_and_more(channel: Channel, films: Dataset) -> None:
    attack = CuriousAbandonHonesty(units=300, read="peeling")
    found = attacked(attack, films, 16, channel=channel)
    assert alone_in_a_unit(found) >= 10
    assert found.recovered >= 0.95 * alone_in_a_unit(found)
    assert found.recovered == len(found.result.images)


def test_reading_units_without_a_certificate_gives_most_of_them(films: Dataset) -> None:
    found = attacked(CuriousAbandonHonesty(units=300), films, 16)
    assert found.recovered >= 0.6 * alone_in_a_unit(found)
    assert len(found.result.images) <= 16
    assert "calibrated" in found.result.notes[0]


@pytest.mark.parametrize("read", ["units", "peeling"])
def test_the_models_own_dense_layer(read: Any, films: Dataset) -> None:
    attack = CuriousAbandonHonesty(place="own", read=read)
    model = dense(films)
    assert attack.needs() == {"parameters"}
    assert attack.added_parameters(model, 1) == 0
    found = attacked(attack, films, 16, model=model)
    assert list(found.observation.model.parameters) == list(model.parameters)
    assert found.recovered >= (0.95 if read == "peeling" else 0.6) * alone_in_a_unit(found, "1") >= 5


def test_the_mean_unit_is_active_for_about_one_image(films: Dataset) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = films.images.flatten(1)
    for signs in ("independent", "mirrored"):
        traps = drawn_traps(200, 784, 1.0, signs, generator)
        for tuned in (with_factor(traps, inputs[:700], 1 / 32), with_thresholds(traps, inputs[:700], 1 / 32)):
            values = inputs[700:].double() @ tuned.weights.T + tuned.bias
            assert float((values > 0).double().sum(dim=1).mean()) / 200 == pytest.approx(1 / 32, abs=0.01)


def test_independent_signs_are_half_negative_and_mirrored_rows_sum_to_nearly_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    mirrored = drawn_traps(50, 400, 0.95, "mirrored", generator)
    assert int((mirrored.weights < 0).sum(dim=1).min()) == int((mirrored.weights < 0).sum(dim=1).max()) == 200
    torch.testing.assert_close(mirrored.weights.sum(dim=1), -0.05 * mirrored.positive.sum(dim=1))
    independent = drawn_traps(50, 400, 1.0, "independent", generator)
    assert float((independent.weights < 0).double().mean()) == pytest.approx(0.5, abs=0.02)
    assert float(independent.weights.std()) == pytest.approx(1.0, abs=0.03)


def test_readable_images_by_hand() -> None:
    active = torch.tensor([[True, False, True], [False, False, True], [False, True, True]])
    assert readable(active).tolist() == [True, False, True]


def test_images_of_equal_brightness_need_thresholds(films: Dataset) -> None:
    """What all images have in common decides whether a unit of zero bias is active, for all of them at once."""
    alike = replace(films, images=0.45 + 0.1 * films.images)
    by_factor, by_threshold = (
        alone_in_a_unit(
            attacked(CuriousAbandonHonesty(units=300, tuning=tuning, scale=1e-3), alike, 16, recipe=GRADIENT)
        )
        for tuning in ("factor", "thresholds")
    )
    assert by_threshold >= 10
    assert by_factor <= by_threshold - 5


def test_what_it_cannot_do_is_refused_with_the_reason(films: Dataset) -> None:
    attack, model = CuriousAbandonHonesty(), lenet(films, 0)
    own = CuriousAbandonHonesty(place="own")
    assert attack.why_not(model, SGD, "weights", 8) is None
    assert attack.needs() == {"parameters", "architecture"}
    assert "place: front" in (own.why_not(model, SGD, "weights", 8) or "")
    assert "needs ReLU" in (own.why_not(dense(films, nn.Sigmoid()), SGD, "weights", 8) or "")
    assert own.why_not(dense(films), SGD, "weights", 8) is None
    assert "recipe is withheld" in (attack.why_not(model, None, "weights", 8) or "")
    assert "GiB" in (CuriousAbandonHonesty(units=10**9).why_not(model, SGD, "weights", 8) or "")
    several = replace(model, task=MultiLabel(2))
    assert "read: units" in (CuriousAbandonHonesty(read="peeling").why_not(several, SGD, "weights", 8) or "")
    view = ServerView(model, SGD, "weights", Plain(), 1, "malicious_server", frozenset())
    with pytest.raises(AttackFailure, match="auxiliary"):
        attack.prepare(view, torch.Generator())
    (nothing,) = attack.reconstruct(
        [replace(attacked(attack, films, 4).observation, broadcast=None)], [torch.Generator()]
    )
    assert isinstance(nothing, Failure)

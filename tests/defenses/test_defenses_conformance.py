"""What every registered defense must do, and the distribution of the noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from pydantic import ValidationError
from torch import nn

from medpfl.core.domain import Batch, ClientState, GlobalModel, Recipe, Update
from medpfl.core.mechanisms import GaussianNoise, LaplaceNoise, Mechanism, Unchanged
from medpfl.core.tasks import SingleLabel
from medpfl.defenses import DEFENSES, Defense, Gaussian, Laplace, NoDefense
from medpfl.federation.client import client_step
from medpfl.models import build_model, prepare


@dataclass(frozen=True)
class Expectation:
    """What a defense claims: mechanism, whether it is random, and the noise's distribution function."""

    defense: Defense
    mechanism: Mechanism
    random: bool
    distribution: Callable[[Any], Any] | None = None
    warns: bool = False


TABLE = {
    "none": Expectation(NoDefense(), Unchanged(), random=False),
    "laplace": Expectation(
        Laplace(scale=0.02), LaplaceNoise(0.02), random=True, distribution=scipy.stats.laplace(0, 0.02).cdf, warns=True
    ),
    "gaussian": Expectation(
        Gaussian(std=0.03), GaussianNoise(0.03), random=True, distribution=scipy.stats.norm(0, 0.03).cdf, warns=True
    ),
}


@pytest.fixture(scope="module")
def model() -> GlobalModel:
    """Sixty thousand entries with batch norm."""
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 200), nn.Linear(200, 2))
    return prepare(module, name="wide", image_shape=(1, 8, 8), task=SingleLabel(2))


def clean_update(model: GlobalModel, kind: Any, dtype: torch.dtype = torch.float32) -> Update:
    """An update that carries buffers and counters."""
    return Update(kind, dict(model.to(dtype).parameters), dict(model.buffers), dict(model.counters), 1)


def defended(defense: Defense, update: Update, model: GlobalModel, seed: int) -> Update:
    """What the defense makes of it."""
    return defense.update(update, model, ClientState(), torch.Generator().manual_seed(seed))[0]


def test_every_registered_defense_has_an_expectation() -> None:
    assert set(DEFENSES.names()) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
class TestEveryDefense:
    """Conformance."""

    @pytest.mark.parametrize("kind", ["gradient", "delta", "weights"])
    def test_keeps_form_and_leaves_buffers_and_counters_alone(self, name: str, kind: Any, model: GlobalModel) -> None:
        update = clean_update(model, kind)
        sent = defended(TABLE[name].defense, update, model, 0)
        assert (sent.kind, sent.examples, list(sent.trainable)) == (kind, 1, list(update.trainable))
        for key, tensor in update.trainable.items():
            assert sent.trainable[key].shape == tensor.shape
            assert sent.trainable[key].dtype == tensor.dtype
        for key, tensor in update.buffers.items():
            assert torch.equal(sent.buffers[key], tensor)
        for key, tensor in update.counters.items():
            assert torch.equal(sent.counters[key], tensor)

    def test_depends_on_its_generator_only(self, name: str, model: GlobalModel) -> None:
        update = clean_update(model, "gradient")
        before = torch.get_rng_state()
        first, again, other = (defended(TABLE[name].defense, update, model, seed) for seed in (1, 1, 2))
        assert torch.equal(before, torch.get_rng_state())
        for key in update.trainable:
            assert torch.equal(first.trainable[key], again.trainable[key])
            if TABLE[name].random:
                assert not torch.equal(first.trainable[key], other.trainable[key])

    def test_does_not_write_into_what_it_was_given(self, name: str, model: GlobalModel) -> None:
        update = clean_update(model, "delta")
        copies = {key: tensor.clone() for key, tensor in update.trainable.items()}
        defended(TABLE[name].defense, update, model, 0)
        assert all(torch.equal(copies[key], tensor) for key, tensor in update.trainable.items())

    def test_adds_what_its_mechanism_says(self, name: str, model: GlobalModel) -> None:
        expectation = TABLE[name]
        assert expectation.defense.mechanism() == expectation.mechanism
        update = clean_update(model, "gradient", torch.float64)
        sent = defended(expectation.defense, update, model, 3)
        noise = torch.cat([(sent.trainable[key] - update.trainable[key]).flatten() for key in update.trainable]).numpy()
        if expectation.distribution is None:
            assert not noise.any()
            return
        assert np.isfinite(noise).all()
        assert scipy.stats.kstest(noise, expectation.distribution).pvalue > 0.001
        assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.02

    def test_noise_is_the_same_in_every_precision(self, name: str, model: GlobalModel) -> None:
        single = defended(TABLE[name].defense, clean_update(model, "gradient"), model, 4)
        double = defended(TABLE[name].defense, clean_update(model, "gradient", torch.float64), model, 4)
        for key in single.trainable:
            torch.testing.assert_close(single.trainable[key].double(), double.trainable[key], rtol=1e-5, atol=1e-6)

    def test_runs_inside_the_client_step(self, name: str) -> None:
        net = build_model(
            "lenet_dlg", image_shape=(1, 12, 12), task=SingleLabel(2), generator=torch.Generator().manual_seed(0)
        )
        batch = Batch(torch.rand((1, 1, 12, 12), generator=torch.Generator().manual_seed(1)), torch.tensor([1]))
        clean, _ = client_step(net, batch, Recipe())
        sent, state = client_step(
            net, batch, Recipe(), hooks=TABLE[name].defense, generator=torch.Generator().manual_seed(5)
        )
        expected = defended(TABLE[name].defense, clean, net, 5)
        assert state.rounds == 1
        for key in clean.trainable:
            assert torch.equal(sent.trainable[key], expected.trainable[key])

    def test_noise_without_clipping_says_that_it_guarantees_nothing(self, name: str) -> None:
        warnings = TABLE[name].defense.warnings()
        assert bool(warnings) == TABLE[name].warns
        assert all("clipping" in sentence and "no differential-privacy guarantee" in sentence for sentence in warnings)


@pytest.mark.parametrize(("kind", "field"), [(Laplace, "scale"), (Gaussian, "std")])
@pytest.mark.parametrize("value", [0.0, -1.0, "much", float("nan"), float("inf")])
def test_impossible_amounts_of_noise_are_refused(kind: Any, field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        kind(**{field: value})

"""What every registered defense must do, and the distribution of the noise."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
import scipy.stats
import torch
from pydantic import ValidationError
from torch import nn

from medpfl.attacks import ATTACKS
from medpfl.core.domain import Batch, ClientState, GlobalModel, Recipe, Update
from medpfl.core.mechanisms import (
    Adapters,
    Augmented,
    Clipped,
    ClippedSteps,
    Composed,
    GaussianNoise,
    LaplaceNoise,
    LowRank,
    MaskedFeatures,
    Mechanism,
    Mixtures,
    OrthogonalDirection,
    Pruned,
    Quantized,
    RandomK,
    Shared,
    Signs,
    StochasticLayer,
    ThreeValues,
    TopK,
    Unchanged,
)
from medpfl.core.tasks import SingleLabel
from medpfl.defenses import (
    ATS,
    DEFENSES,
    DPSGD,
    Censor,
    Clip,
    Defense,
    DeltaBound,
    FedCDP,
    FedSDP,
    Gaussian,
    GroupNorm,
    InstaHide,
    Laplace,
    LocalDP,
    Lora,
    LowRankFactors,
    Mixup,
    ModelCloaking,
    NoDefense,
    Precode,
    Prune,
    Quantize,
    RandomEntries,
    Share,
    Sign,
    Soteria,
    TopEntries,
)
from medpfl.federation.client import client_step
from medpfl.models import build_model, prepare

NO_GUARANTEE = "there is no formal guarantee"


@dataclass(frozen=True)
class Expectation:
    """What a defense claims.

    random: whether its `update` draws for every tensor. distribution: of the noise that `update` adds, None where it does not just add.
    changes: whether `update` changes trainable entries. statistics: what becomes of buffers and counters. warns: a word of
    its warning.
    """

    defense: Defense
    mechanism: Mechanism
    random: bool
    distribution: Callable[[Any], Any] | None = None
    changes: bool = True
    statistics: Literal["kept", "received", "left_out"] = "kept"
    warns: str = ""


TABLE = {
    "none": Expectation(NoDefense(), Unchanged(), random=False, changes=False),
    "group_norm": Expectation(GroupNorm(), Unchanged(), random=False, changes=False),
    "laplace": Expectation(
        Laplace(scale=0.02),
        LaplaceNoise(0.02),
        random=True,
        distribution=scipy.stats.laplace(0, 0.02).cdf,
        warns="no differential-privacy guarantee",
    ),
    "gaussian": Expectation(
        Gaussian(std=0.03),
        GaussianNoise(0.03),
        random=True,
        distribution=scipy.stats.norm(0, 0.03).cdf,
        warns="no differential-privacy guarantee",
    ),
    "soteria": Expectation(Soteria(percentile=40), MaskedFeatures(40), random=False, changes=False, warns=NO_GUARANTEE),
    "precode": Expectation(Precode(width=8), StochasticLayer(), random=False, changes=False, warns=NO_GUARANTEE),
    "mixup": Expectation(Mixup(), Mixtures(4), random=False, changes=False, warns=NO_GUARANTEE),
    "instahide": Expectation(
        InstaHide(images=3), Mixtures(3, signs=True), random=False, changes=False, warns=NO_GUARANTEE
    ),
    "ats": Expectation(
        ATS(policy="0-1"),
        Augmented(((("invert", 0.2), ("invert", 0.4)),)),
        random=False,
        changes=False,
        warns=NO_GUARANTEE,
    ),
    "clip": Expectation(Clip(bound=0.5), Clipped(0.5), random=False, warns="without noise"),
    "delta_bound": Expectation(DeltaBound(bound=0.5), Clipped(0.5), random=False, warns="without noise"),
    "dp_sgd": Expectation(
        DPSGD(bound=0.5, noise_multiplier=2.0),
        ClippedSteps(0.5, 2.0, sampled=True),
        random=False,
        changes=False,
        statistics="received",
    ),
    "fed_cdp": Expectation(
        FedCDP(bound=0.5, noise_multiplier=2.0),
        ClippedSteps(0.5, 2.0, per_tensor=True),
        random=False,
        changes=False,
        statistics="received",
    ),
    "fed_sdp": Expectation(
        FedSDP(bound=0.5, noise_multiplier=2.0),
        Composed((Clipped(0.5), GaussianNoise(1.0))),
        random=True,
        statistics="received",
    ),
    "model_cloaking": Expectation(
        ModelCloaking(bound=0.5, noise_multiplier=2.0),
        Composed((Clipped(0.5), GaussianNoise(1.0))),
        random=True,
        statistics="received",
        warns="stand-in",
    ),
    "local_dp": Expectation(
        LocalDP(epsilon=2.0, length=0.1), ThreeValues(2.0, 0.1), random=True, statistics="received", warns="m * T"
    ),
    "prune": Expectation(Prune(percentile=60), Pruned(60.0), random=False, warns=NO_GUARANTEE),
    "top_k": Expectation(TopEntries(share=0.3), TopK(0.3), random=False, warns=NO_GUARANTEE),
    "random_k": Expectation(RandomEntries(share=0.3), RandomK(0.3), random=False, warns=NO_GUARANTEE),
    "sign": Expectation(Sign(), Signs(scaled=True), random=False, warns=NO_GUARANTEE),
    "quantize": Expectation(Quantize(bits=4), Quantized(7), random=False, warns=NO_GUARANTEE),
    "low_rank": Expectation(LowRankFactors(rank=3), LowRank(3), random=False, warns=NO_GUARANTEE),
    "censor": Expectation(Censor(trials=2), OrthogonalDirection(), random=False, changes=False, warns=NO_GUARANTEE),
    "share": Expectation(
        Share(), Shared(buffers=False), random=False, changes=False, statistics="left_out", warns=NO_GUARANTEE
    ),
    "lora": Expectation(Lora(rank=2), Adapters(2), random=False, changes=False, warns=NO_GUARANTEE),
}


@pytest.fixture(scope="module")
def model() -> GlobalModel:
    """Sixty thousand entries with batch norm."""
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 200), nn.Linear(200, 2))
    return prepare(module, name="wide", image_shape=(1, 8, 8), task=SingleLabel(2))


def clean_update(model: GlobalModel, kind: Any, dtype: torch.dtype = torch.float32) -> Update:
    """An update that carries new buffers and counters."""
    buffers = {name: tensor + 0.5 for name, tensor in model.buffers.items()}
    counters = {name: tensor + 1 for name, tensor in model.counters.items()}
    return Update(kind, dict(model.to(dtype).parameters), buffers, counters, 1)


def defended(defense: Defense, update: Update, model: GlobalModel, seed: int) -> Update:
    """What the defense makes of it."""
    return defense.update(update, model, ClientState(), torch.Generator().manual_seed(seed))[0]


def test_every_registered_defense_has_an_expectation() -> None:
    assert set(DEFENSES.names()) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
class TestEveryDefense:
    """Conformance."""

    @pytest.mark.parametrize("kind", ["gradient", "delta", "weights"])
    def test_keeps_form_and_treats_buffers_and_counters_as_it_says(
        self, name: str, kind: Any, model: GlobalModel
    ) -> None:
        update = clean_update(model, kind)
        sent = defended(TABLE[name].defense, update, model, 0)
        assert (sent.kind, sent.examples, list(sent.trainable)) == (kind, 1, list(update.trainable))
        for key, tensor in update.trainable.items():
            assert sent.trainable[key].shape == tensor.shape
            assert sent.trainable[key].dtype == tensor.dtype
        if TABLE[name].statistics == "left_out":
            assert not {**sent.buffers, **sent.counters}
            return
        expected = update if TABLE[name].statistics == "kept" else model
        assert (sent.buffers.keys(), sent.counters.keys()) == (update.buffers.keys(), update.counters.keys())
        assert all(torch.equal(sent.buffers[key], expected.buffers[key]) for key in update.buffers)
        assert all(torch.equal(sent.counters[key], expected.counters[key]) for key in update.counters)

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
        assert bool(noise.any()) == expectation.changes
        if expectation.distribution is None:
            return
        assert np.isfinite(noise).all()
        assert scipy.stats.kstest(noise, expectation.distribution).pvalue > 0.001
        assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.02

    def test_noise_is_the_same_in_every_precision(self, name: str, model: GlobalModel) -> None:
        single = defended(TABLE[name].defense, clean_update(model, "gradient"), model, 4)
        double = defended(TABLE[name].defense, clean_update(model, "gradient", torch.float64), model, 4)
        for key in single.trainable:
            torch.testing.assert_close(single.trainable[key].double(), double.trainable[key], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("kind", ["gradient", "delta", "weights"])
    def test_runs_inside_the_client_step(self, name: str, kind: Any) -> None:
        net = build_model(
            "lenet_dlg", image_shape=(1, 12, 12), task=SingleLabel(2), generator=torch.Generator().manual_seed(0)
        )
        net, recipe = TABLE[name].defense.model(net), Recipe(update=kind)
        held = 4 if type(TABLE[name].defense).batch is not Defense.batch else 1
        recipe = replace(recipe, batch_size=held)
        batch = Batch(torch.rand((held, 1, 12, 12), generator=torch.Generator().manual_seed(1)), torch.arange(held) % 2)
        draws = [torch.Generator().manual_seed(5) for _ in range(3)]
        sent, again = (
            client_step(net, batch, recipe, hooks=TABLE[name].defense, generator=draws.pop()) for _ in range(2)
        )
        assert sent[1].rounds == 1
        assert all(torch.equal(sent[0].trainable[key], again[0].trainable[key]) for key in net.parameters)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in sent[0].trainable.values())
        inside = [
            hook
            for hook in ("gradient", "batch")
            if getattr(type(TABLE[name].defense), hook) is not getattr(Defense, hook)
        ]
        if not TABLE[name].defense.clips_per_example and not inside:
            clean, _ = client_step(net, batch, recipe)
            expected, _ = TABLE[name].defense.update(clean, net, ClientState(), draws.pop())
            assert all(torch.equal(sent[0].trainable[key], expected.trainable[key]) for key in clean.trainable)

    def test_says_what_must_stand_beside_its_numbers(self, name: str) -> None:
        warnings = TABLE[name].defense.warnings()
        assert bool(warnings) == bool(TABLE[name].warns)
        assert all(TABLE[name].warns in sentence for sentence in warnings)

    def test_names_the_attack_that_knows_it(self, name: str) -> None:
        attack = dict(TABLE[name].defense.adaptive_attack)
        assert bool(attack) == (TABLE[name].defense.mechanism() != Unchanged())
        if attack:
            kind = ATTACKS[attack.pop("name")].item
            assert "defense" in kind(**attack).uses() | kind(**attack).requires()

    def test_can_be_sent_to_another_process(self, name: str) -> None:
        assert pickle.loads(pickle.dumps(TABLE[name].defense)) == TABLE[name].defense  # noqa: S301


@pytest.mark.parametrize(("kind", "field"), [(Laplace, "scale"), (Gaussian, "std")])
@pytest.mark.parametrize("value", [0.0, -1.0, "much", float("nan"), float("inf")])
def test_impossible_amounts_of_noise_are_refused(kind: Any, field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        kind(**{field: value})

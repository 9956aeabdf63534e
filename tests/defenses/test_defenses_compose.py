"""Compositions: the order, what is refused, what guarantee is left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic.dataclasses import dataclass

from medpfl.audit.spec import parse_spec
from medpfl.core.config import STRICT
from medpfl.core.domain import Batch, ClientState, GlobalModel, Tensors, Update
from medpfl.core.errors import SpecError
from medpfl.core.guarantees import Guarantee, Release
from medpfl.core.mechanisms import Clipped, Composed, GaussianNoise, LaplaceNoise
from medpfl.core.recipes import Recipe
from medpfl.core.tasks import SingleLabel
from medpfl.defenses import (
    DEFENSES,
    DPSGD,
    Censor,
    Clip,
    Composition,
    Defense,
    FedCDP,
    FedSDP,
    Gaussian,
    GroupNorm,
    Laplace,
    NoDefense,
    Quantize,
    Sign,
    TopEntries,
)
from medpfl.federation import client_step
from medpfl.federation.hooks import Step
from medpfl.models import build_model


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Stand(Defense):
    """Doubles the update and counts its rounds; may feed back."""

    error_feedback: bool = False

    def update(
        self, update: Update, model: GlobalModel, state: ClientState, generator: torch.Generator
    ) -> tuple[Update, ClientState]:
        doubled = {name: 2 * tensor for name, tensor in update.trainable.items()}
        seen = state.tensors.get("seen", torch.zeros(())) + 1
        return Update(update.kind, doubled, update.buffers, update.counters, update.examples), ClientState(
            state.rounds, {"seen": seen}
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Reader(Defense):
    """Changes a step's gradient, by what it sees of the images."""

    reads_images: ClassVar[bool] = True

    def gradient(self, step: Step, generator: torch.Generator) -> Tensors:
        return {name: 3 * tensor for name, tensor in step.gradients.items()}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Mixer(Defense):
    """Turns the images over."""

    def batch(self, batch: Batch, model: GlobalModel, generator: torch.Generator) -> Batch:
        return Batch(batch.images.flip(0), batch.targets.flip(0))


def named(monkeypatch: pytest.MonkeyPatch, **kinds: type[Defense]) -> None:
    """Registers stand-ins where nothing has these names."""
    entries = {name: entry for name, entry in DEFENSES._entries.items() if name not in kinds}
    monkeypatch.setattr(DEFENSES, "_entries", entries)
    for name, kind in kinds.items():
        DEFENSES.add(name, kind, summary="for a test")


@pytest.fixture(scope="module")
def model() -> GlobalModel:
    return build_model(
        "lenet_idlg", image_shape=(1, 16, 16), task=SingleLabel(3), generator=torch.Generator().manual_seed(0)
    )


BATCH = Batch(torch.rand((1, 1, 16, 16), generator=torch.Generator().manual_seed(1)), torch.tensor([2]))


def sent(model: GlobalModel, parts: Sequence[Defense], seed: int = 0, state: ClientState | None = None) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return client_step(model, BATCH, Recipe(), hooks=Composition(tuple(parts)), generator=generator, state=state)


def test_parts_act_in_the_order_of_the_list(model: GlobalModel) -> None:
    clean, _ = client_step(model, BATCH, Recipe())
    once, _ = client_step(model, BATCH, Recipe(), hooks=Clip(bound=0.1))
    clipped_then_doubled = sent(model, [Clip(bound=0.1), Stand()])[0]
    doubled_then_clipped = sent(model, [Reader(), Stand(), Clip(bound=0.1)])[0]
    for name in clean.trainable:
        torch.testing.assert_close(clipped_then_doubled.trainable[name], 2 * once.trainable[name])
        torch.testing.assert_close(doubled_then_clipped.trainable[name], once.trainable[name], rtol=1e-4, atol=1e-7)


def test_a_composition_of_one_or_with_none_is_that_one(model: GlobalModel) -> None:
    alone, _ = client_step(model, BATCH, Recipe(), hooks=Laplace(), generator=torch.Generator().manual_seed(4))
    composed = sent(model, [NoDefense(), Laplace()], seed=4)[0]
    assert all(torch.equal(alone.trainable[name], composed.trainable[name]) for name in alone.trainable)
    assert Composition((NoDefense(), Laplace())).mechanism() == LaplaceNoise(0.01)


def test_every_part_keeps_a_state_of_its_own(model: GlobalModel) -> None:
    parts, state = [Stand(), Stand()], ClientState()
    for _ in range(3):
        _, state = sent(model, parts, state=state)
    assert state.rounds == 3
    assert [float(tensor) for tensor in state.tensors.values()] == [3.0, 3.0]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((Clip(bound=2.0), Gaussian(std=6.0)), ("client", "gaussian", 3.0)),
        ((Clip(bound=2.0, norm="l1"), Laplace(scale=6.0)), ("client", "laplace", 3.0)),
        ((Clip(bound=2.0, norm="l1"), Gaussian(std=6.0)), ("client", "gaussian", 3.0)),
        ((Clip(bound=2.0, unit="image"), Gaussian(std=6.0)), ("image", "gaussian", 3.0)),
        ((Clip(bound=2.0), Gaussian(std=6.0), Stand(error_feedback=True)), ("client", "gaussian", 3.0)),
        ((Clip(bound=9.0), Stand(), Clip(bound=2.0), Gaussian(std=6.0)), ("client", "gaussian", 3.0)),
        ((Clip(bound=2.0), Laplace(scale=6.0)), None),  # an l2 bound says nothing about the sum of absolute values
        ((Clip(bound=2.0), Stand(), Gaussian(std=6.0)), None),  # doubled after the bound
        ((Gaussian(std=6.0), Clip(bound=2.0)), None),
        ((Clip(bound=2.0),), None),
        ((Reader(), Clip(bound=2.0)), None),
        ((Mixer(), FedSDP(bound=2.0, noise_multiplier=3.0), Stand()), ("client", "gaussian", 3.0)),
        ((GroupNorm(), DPSGD(noise_multiplier=3.0), Stand()), ("image", "gaussian", 3.0)),
    ],
)  # fmt: skip
def test_clipping_and_noise_have_a_guarantee_that_post_processing_keeps(
    parts: tuple[Defense, ...], expected: tuple[str, str, float] | None
) -> None:
    found: Guarantee | None = Composition(parts).guarantee(Recipe(), 1)
    if expected is None:
        assert found is None
        return
    unit, kind, scale = expected
    assert found is not None
    assert found.unit == unit
    assert found.releases == (Release(kind, scale),)  # type: ignore[arg-type]


def test_noise_after_a_bound_no_longer_warns_that_it_guarantees_nothing() -> None:
    assert not Composition((Clip(), Gaussian())).warnings()
    assert len(Composition((Clip(), Laplace())).warnings()) == 2
    assert Composition((Clip(), Gaussian())).mechanism() == Composed((Clipped(1.0), GaussianNoise(0.01)))


def test_what_claims_a_guarantee_sends_no_news_of_buffers(model: GlobalModel) -> None:
    net = build_model(
        "resnet18_cifar", image_shape=(1, 16, 16), task=SingleLabel(2), generator=torch.Generator().manual_seed(0)
    )
    news = {name: tensor + 1 for name, tensor in net.buffers.items()}
    update = Update("delta", net.parameters, news, net.counters, 1)
    for parts, expected in (((Clip(), Gaussian()), net.buffers), ((Gaussian(), Clip()), news)):
        found, _ = Composition(parts).update(update, net, ClientState(), torch.Generator().manual_seed(0))
        assert all(torch.equal(found.buffers[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("names", "parts", "words"),
    [
        ({"sign": Stand}, (Clip(), Stand(), Gaussian()), "gaussian after sign .* list gaussian before sign"),
        ({"sign": Stand}, (Stand(), FedSDP()), "fed_sdp after sign"),
        ({"top_k": Stand}, (Stand(error_feedback=True), Clip(), Gaussian()), "error feedback of top_k keeps .* gaussian"),
        ({"top_k": Stand}, (Stand(error_feedback=True), FedSDP()), "error_feedback: false"),
        ({"soteria": Reader}, (DPSGD(), Reader()), "soteria looks at the private images again after .* dp_sgd is lost"),
        ({"censor": Reader}, (FedCDP(), Reader()), "censor looks at the private images again"),
        ({"mixup": Mixer}, (Mixer(), DPSGD()), "mixup puts an image into several"),
        ({}, (DPSGD(), FedCDP()), "dp_sgd and fed_cdp both"),
        ({}, (Clip(), DPSGD()), "dp_sgd acts on each image's gradient and so before clip.*; list dp_sgd before clip"),
        ({"mixup": Mixer}, (Gaussian(), Mixer()), "list mixup before gaussian"),
        ({}, (Clip(unit="image"), Gaussian()), "bounds nothing of a single image"),
    ],
)  # fmt: skip
def test_orders_that_make_no_sense_are_refused_with_the_reason(
    names: dict[str, type[Defense]],
    parts: tuple[Defense, ...],
    words: str,
    model: GlobalModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named(monkeypatch, **names)
    recipe, batch = Recipe(batch_size=2), Batch(BATCH.images.repeat(2, 1, 1, 1), torch.tensor([0, 1]))
    with pytest.raises(SpecError, match=words):
        client_step(model, batch, recipe, hooks=Composition(parts))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((Sign(), Gaussian()), "gaussian after sign"),
        ((Sign(error_feedback=True), FedSDP()), "error feedback of sign"),
        ((TopEntries(error_feedback=True), Gaussian()), "error feedback of top_k"),
        ((DPSGD(), Censor()), "censor looks at the private images again"),
    ],
)
def test_the_registered_defenses_are_refused_in_these_orders(
    parts: tuple[Defense, ...], words: str, model: GlobalModel
) -> None:
    assert any(words in problem for problem in Composition(parts).refusals(model, Recipe()))
    assert Composition(parts).guarantee(Recipe(), 1) is None
    assert not Composition(parts[::-1]).refusals(model, Recipe()) or isinstance(parts[1], Censor)


@pytest.mark.parametrize("last", [Sign(), TopEntries(error_feedback=True), Quantize()])
def test_compressing_what_is_noisy_keeps_the_guarantee(last: Defense) -> None:
    found = Composition((Clip(bound=2.0), Gaussian(std=6.0), last)).guarantee(Recipe(), 1)
    assert found is not None
    assert found.releases == (Release("gaussian", 3.0),)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ({"sign": Stand}, (Clip(), Gaussian(), Stand())),
        ({"top_k": Stand}, (Clip(), Gaussian(), Stand(error_feedback=True))),
        ({"top_k": Stand}, (Stand(), Clip(), Gaussian())),
        ({"soteria": Reader}, (Reader(), Clip(), Gaussian())),
        ({"mixup": Mixer}, (Mixer(), Reader(), FedSDP())),
        ({}, (GroupNorm(), DPSGD(), Clip())),
    ],
)
def test_orders_that_make_sense_run(
    names: dict[str, type[Defense]], parts: tuple[Defense, ...], model: GlobalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    named(monkeypatch, **names)
    update, _ = sent(model, parts)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in update.trainable.values())


DATA = {"name": "films", "reader": "phantom", "kind": "chest", "count": 30, "size": 16, "victims": 1}


def parsed(defenses: list[Any], base: Path) -> Any:
    spec = {
        "data": [DATA],
        "models": [{"name": "lenet_idlg"}],
        "defenses": defenses,
        "attacks": [{"name": "cpl", "iterations": 1}],
    }
    return parse_spec(spec, base).defenses


def test_a_spec_composes_defenses(tmp_path: Path) -> None:
    plain, labeled = parsed(
        [
            {"compose": [{"name": "clip", "bound": 2}, {"name": "laplace", "scale": 0.5}]},
            {"compose": [{"name": "clip"}, {"name": "laplace"}], "label": "weak"},
        ],
        tmp_path,
    )
    assert (plain.id, plain.name, labeled.id) == ("clip-laplace", "clip-laplace", "weak")
    assert plain.defense == Composition((Clip(bound=2.0), Laplace(scale=0.5)))
    assert plain.params["compose"][0] == {"name": "clip", "bound": 2.0, "norm": "l2", "unit": "client"}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"compose": []}, r"defenses\[0\].compose: expected a list"),
        ({"compose": {"name": "clip"}}, r"expected a list"),
        ({"compose": ["clip"]}, r"compose\[0\]: expected a mapping"),
        ({"compose": [{"name": "clop"}]}, r"compose\[0\].*did you mean 'clip'"),
        ({"compose": [{"name": "clip", "bounds": 1}]}, r"unknown key 'bounds': did you mean 'bound'"),
        ({"compose": [{"name": "clip", "label": "x"}]}, r"compose\[0\].label: belongs beside compose"),
        ({"compose": [{"compose": [{"name": "clip"}]}]}, r"compose\[0\].compose: belongs beside"),
        ({"compose": [{"name": "clip"}], "name": "clip"}, r"unknown key 'name' beside compose"),
        ({"compose": [{"name": "clip", "bound": -1}]}, r"compose\[0\].bound"),
        ({"name": "clip", "compos": []}, r"unknown key 'compos': did you mean 'compose'"),
    ],
)
def test_a_wrong_composition_in_a_spec_is_one_clear_sentence(entry: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=words):
        parsed([entry], tmp_path)

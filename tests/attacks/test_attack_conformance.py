"""What every registered attack must do, on small models. A new attack adds a row to `SETTINGS`."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medpfl.attacks import ATTACKS
from medpfl.attacks.base import Attack
from medpfl.attacks.crafted import CraftedAttack
from medpfl.attacks.gradinv import GradInv
from medpfl.core.domain import (
    CAPABILITIES,
    KNOWLEDGE,
    ORACLES,
    Batch,
    Failure,
    GlobalModel,
    Knowledge,
    Observation,
    Recipe,
    Reconstruction,
)
from medpfl.core.errors import Interrupted
from medpfl.core.session import NO_SESSION, Session, State
from medpfl.federation.client import client_step

SETTINGS: dict[str, dict[str, Any]] = {
    "april": {},
    "ats_decoding": {"iterations": 30, "tolerance": 0.0, "undoing_steps": 5},
    "cpl": {"iterations": 3, "inner_iterations": 10, "restarts": 2, "tolerance": 0.0},
    "dlg": {"iterations": 3, "inner_iterations": 10, "restarts": 2, "tolerance": 0.0},
    "fedavg_inversion": {"iterations": 25, "restarts": 2},
    "feature_readout": {"iterations": 40, "restarts": 2},
    "first_layer_readout": {},
    "gradinv": {"iterations": 25, "restarts": 2, "median_filter_every": 7, "layers": "top10"},
    "gradinversion": {"iterations": 25, "restarts": 3, "warm_up": 5},
    "mixture_decoding": {"iterations": 25, "decoding_steps": 20},
    "idlg": {"iterations": 3, "inner_iterations": 10, "restarts": 2, "output_error": "candidate"},
    "maximum_a_posteriori": {"prior": "total_variation", "iterations": 25, "restarts": 2},
    "peeling": {},
    "spear": {"draws": 20_000},
}
"""Enough work for several restarts, blocks and snapshots, and no more."""

CRAFTED = {
    "ares",
    "curious_abandon_honesty",
    "fishing",
    "loki",
    "medleak",
    "robbing_the_fed",
    "scale_mia",
}
"""Attacks that read only what they prepared themselves; their tests are in files of their own."""

SEVERAL_STEPS = {"sratta"}
"""Attacks that read only what several local steps leave; the same."""

CLOSED_FORMS = {"april", "first_layer_readout", "peeling", "spear"}
LONG_RUNNING = sorted(set(SETTINGS) - CLOSED_FORMS)
TRANSFORMERS = {"april"}
"""Attacks that read tokens; the others are tested on dense nets."""
SIMULATE_CLIENTS = ("cpl", "dlg", "fedavg_inversion", "gradinv", "gradinversion", "idlg", "maximum_a_posteriori")

Observe = Callable[..., Observation]


class Interrupting:
    """Keeps snapshots as bytes, as a store would, and stops the computation at the chosen checkpoint."""

    def __init__(self, stop_at: int, saved: bytes | None = None) -> None:
        self.stop_at = stop_at
        self.saved = saved
        self.calls = 0

    def restore(self) -> State | None:
        if self.saved is None:
            return None
        state: State = torch.load(io.BytesIO(self.saved), weights_only=True)
        return state

    def checkpoint(self, done: int, total: int, state: Callable[[], State]) -> None:
        assert 0 <= done <= total
        self.calls += 1
        if self.calls == self.stop_at:
            buffer = io.BytesIO()
            torch.save(state(), buffer)
            self.saved = buffer.getvalue()
            raise Interrupted("stopped by the test")


@pytest.fixture(params=sorted(SETTINGS))
def attack(request: pytest.FixtureRequest) -> Attack:
    return ATTACKS[request.param].item(**SETTINGS[request.param])


@pytest.fixture
def net(request: pytest.FixtureRequest, dense_net: Any, token_net: Any) -> Any:
    """Makes small nets of the kind that the test's attack is for."""
    call = getattr(request.node, "callspec", None)
    chosen = {} if call is None else call.params
    return token_net if (chosen.get("attack") or chosen.get("name")) in TRANSFORMERS else dense_net


@pytest.fixture
def model(make_model: Any, net: Any) -> GlobalModel:
    result: GlobalModel = make_model(net(64, 24), (1, 8, 8))
    return result


@pytest.fixture
def observations(model: GlobalModel, observe: Observe, blobs: Any) -> list[Observation]:
    images = blobs(3, (1, 8, 8))
    return [observe(model, images[index : index + 1], torch.tensor([index % 3])) for index in range(3)]


def run(
    attack: Attack, observations: Sequence[Observation], seeds: Sequence[int] = (0, 1, 2), session: Session = NO_SESSION
) -> list[Reconstruction | Failure]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds[: len(observations)]]
    return attack.reconstruct(observations, generators, session)


def reconstructions(results: Sequence[Reconstruction | Failure]) -> list[Reconstruction]:
    assert all(isinstance(one, Reconstruction) for one in results), results
    return [one for one in results if isinstance(one, Reconstruction)]


def check_shape(attack: Attack, observation: Observation, result: Reconstruction) -> None:
    assert 1 <= len(result.images) <= observation.examples
    assert tuple(result.images.shape[1:]) == observation.model.image_shape
    assert bool(torch.isfinite(result.images).all())
    assert float(result.images.min()) >= 0.0
    assert float(result.images.max()) <= 1.0
    assert result.unclamped is not None
    assert torch.equal(result.unclamped.clamp(0, 1), result.images)
    assert result.labels is None or len(result.labels) == len(result.images)
    assert result.objective == pytest.approx(result.objective, nan_ok=False)
    assert result.stop_reason
    counts = [evaluations for evaluations, _ in result.trace]
    assert counts == sorted(counts)
    assert 1 <= len(counts) <= 50


def test_every_registered_attack_is_tested() -> None:
    assert set(ATTACKS.names()) == set(SETTINGS) | CRAFTED | SEVERAL_STEPS
    assert all(issubclass(ATTACKS[name].item, CraftedAttack) == (name in CRAFTED) for name in ATTACKS.names())


@pytest.mark.parametrize("name", sorted(CRAFTED))
def test_crafted_attacks_say_what_they_need_and_read_nothing_else(name: str, observations: list[Observation]) -> None:
    attack = ATTACKS[name].item()
    assert isinstance(attack, CraftedAttack)
    assert attack.needs()
    assert attack.needs() <= set(CAPABILITIES)
    assert attack.requires() | attack.uses() <= set(KNOWLEDGE) - ORACLES
    assert attack.sends
    assert all(isinstance(result, Failure) for result in run(attack, observations))


@pytest.mark.parametrize("word", ["labels", "masks"])
def test_an_attack_that_can_be_told_requires_what_it_is_told(attack: Attack, word: str) -> None:
    told = attack.told(word)
    if told is not None:
        assert word in told.requires() - attack.requires()
        assert told.told(word) is None
        changed = {name for name, value in vars(told).items() if value != getattr(attack, name)}
        assert changed - {"__pydantic_fields_set__"} == {word}


def test_some_attacks_can_be_told_labels_and_some_cannot() -> None:
    assert ATTACKS["gradinv"].item().told("labels") is not None
    assert ATTACKS["idlg"].item().told("labels") is None


def test_results_have_the_promised_form(attack: Attack, observations: list[Observation]) -> None:
    for observation, result in zip(observations, reconstructions(run(attack, observations)), strict=True):
        check_shape(attack, observation, result)
        assert result.gradient_evaluations <= attack.evaluations(observation.model, observation.examples)
        assert result.images.shape[0] == 1


def test_equal_generators_give_equal_bits(attack: Attack, observations: list[Observation]) -> None:
    first, second = (reconstructions(run(attack, observations)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        assert one.objective == other.objective
        assert one.trace == other.trace


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_another_generator_starts_elsewhere(name: str, observations: list[Observation]) -> None:
    attack = ATTACKS[name].item(**SETTINGS[name])
    first = reconstructions(run(attack, observations[:1], seeds=(0,)))[0]
    second = reconstructions(run(attack, observations[:1], seeds=(5,)))[0]
    assert not torch.equal(first.images, second.images)


def test_companions_change_nothing_but_rounding(attack: Attack, observations: list[Observation]) -> None:
    together = reconstructions(run(attack, observations))
    for index, observation in enumerate(observations):
        alone = reconstructions(run(attack, [observation], seeds=(index,)))[0]
        torch.testing.assert_close(alone.images, together[index].images, atol=1e-4, rtol=0)
        assert alone.objective == pytest.approx(together[index].objective, rel=1e-3, abs=1e-12)


def test_models_may_differ_between_observations(
    attack: Attack, make_model: Any, net: Any, observe: Observe, blobs: Any
) -> None:
    images = blobs(2, (1, 8, 8))
    models = [make_model(net(64, 24), (1, 8, 8), seed=seed) for seed in range(2)]
    mixed = [observe(one, images[index : index + 1], torch.tensor([1])) for index, one in enumerate(models)]
    together = reconstructions(run(attack, mixed))
    alone = reconstructions(run(attack, mixed[1:], seeds=(1,)))[0]
    torch.testing.assert_close(alone.images, together[1].images, atol=1e-4, rtol=0)


def test_nothing_that_was_given_is_changed(attack: Attack, observations: list[Observation]) -> None:
    def tensors(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        if isinstance(value, nn.Module):
            return list(value.state_dict().values())
        if isinstance(value, dict):
            return [tensor for item in value.values() for tensor in tensors(item)]
        if is_dataclass(value):
            return [tensor for field in fields(value) for tensor in tensors(getattr(value, field.name))]
        return []

    before = [tensor.clone() for tensor in tensors(observations[0])]
    run(attack, observations)
    after = tensors(observations[0])
    assert len(before) == len(after) > 8
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("name", LONG_RUNNING)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_resumed_runs_equal_uninterrupted_ones_to_the_bit(
    name: str, share: float, observations: list[Observation]
) -> None:
    attack = ATTACKS[name].item(**SETTINGS[name])
    counting = Interrupting(0)
    whole = reconstructions(run(attack, observations, session=counting))
    assert counting.calls >= 3
    stopped = Interrupting(1 + int(share * (counting.calls - 1)))
    with pytest.raises(Interrupted):
        run(attack, observations, session=stopped)
    stopped_again = Interrupting(1, stopped.saved)
    try:
        resumed = run(attack, observations, seeds=(7, 8, 9), session=stopped_again)
    except Interrupted:
        resumed = run(attack, observations, seeds=(7, 8, 9), session=Interrupting(0, stopped_again.saved))
    for one, other in zip(whole, reconstructions(resumed), strict=True):
        assert torch.equal(one.images, other.images)
        assert (one.objective, one.trace, one.gradient_evaluations, one.stop_reason) == (
            other.objective,
            other.trace,
            other.gradient_evaluations,
            other.stop_reason,
        )


def test_an_update_with_nan_fails_alone(attack: Attack, observations: list[Observation]) -> None:
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in observations[1].update.trainable.items()}
    update = replace(observations[1].update, trainable=broken)
    results = run(attack, [observations[0], replace(observations[1], update=update), observations[2]])
    assert isinstance(results[1], Failure)
    assert "finite" in results[1].reason
    expected = run(attack, [observations[0], observations[2]], seeds=(0, 2))
    for result, one in zip(reconstructions([results[0], results[2]]), reconstructions(expected), strict=True):
        assert torch.equal(result.images, one.images)


@pytest.mark.parametrize("kind", ["gradient", "delta", "weights"])
def test_an_update_that_changes_nothing_shows_nothing(
    attack: Attack, kind: Any, observations: list[Observation]
) -> None:
    silent = observations[1]
    nothing = {name: torch.zeros_like(tensor) for name, tensor in silent.update.trainable.items()}
    kept = dict(silent.model.parameters) if kind == "weights" else nothing
    update = replace(silent.update, kind=kind, trainable=kept)
    silent = replace(silent, update=update, recipe=Recipe(update=kind))
    first, middle, last = reconstructions(run(attack, [observations[0], silent, observations[2]]))
    assert middle.images.shape == (0, 1, 8, 8)
    assert middle.labels is None
    assert middle.gradient_evaluations == 0
    assert "nothing came back" in middle.stop_reason
    assert "update is zero" in middle.stop_reason
    assert len(first.images) == len(last.images) == 1


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 6), (1, 6, 5, 4)], ids=["grey", "color", "volume"])
def test_channels_sizes_and_volumes(
    attack: Attack, shape: tuple[int, ...], make_model: Any, net: Any, observe: Observe, blobs: Any
) -> None:
    model = make_model(net(int(torch.tensor(shape).prod()), 24), shape)
    observation = observe(model, blobs(1, shape), torch.tensor([2]))
    check_shape(attack, observation, reconstructions(run(attack, [observation]))[0])


def test_batches(attack: Attack, make_model: Any, net: Any, observe: Observe, blobs: Any) -> None:
    model = make_model(net(64, 96, activation=nn.ReLU()), (1, 8, 8))
    observation = observe(model, blobs(3, (1, 8, 8)), torch.tensor([0, 2, 2]))
    if (reason := attack.why_not(model, observation.recipe, "gradient", 3)) is not None:
        assert "only single images" in reason
        assert run(attack, [observation]) == [Failure(reason)]
        return
    result = reconstructions(run(attack, [observation]))[0]
    check_shape(attack, observation, result)
    assert result.gradient_evaluations <= attack.evaluations(model, 3)


@pytest.mark.parametrize("kind", ["delta", "weights"])
def test_one_sgd_step_shows_what_its_gradient_shows(
    attack: Attack, kind: str, make_model: Any, net: Any, observe: Observe, blobs: Any, as_kind: Any
) -> None:
    model = make_model(net(64, 24), (1, 8, 8), double=True)
    gradient = observe(model, blobs(1, (1, 8, 8)), torch.tensor([1]))
    stepped = as_kind(gradient, kind, 0.1)
    one, other = reconstructions([*run(attack, [gradient]), *run(attack, [stepped])])
    torch.testing.assert_close(one.images, other.images, atol=1e-3, rtol=0)
    assert one.labels is not None
    assert other.labels is not None
    assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("name", SIMULATE_CLIENTS)
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(update="delta", local_steps=2, batch_size=1, learning_rate=0.1),
        Recipe(update="weights", local_steps=1, epochs=2, batch_size=2, learning_rate=0.1, momentum=0.9),
        Recipe(update="gradient", batch_size=2, gradient_clip=0.05),
        Recipe(update="delta", optimizer="adam", batch_size=1, learning_rate=0.01),
    ],
    ids=["two-steps", "two-epochs", "clipped", "adam"],
)
def test_clients_that_need_simulation(name: str, recipe: Recipe, model: GlobalModel, blobs: Any) -> None:
    count = recipe.private_images
    update, _ = client_step(model, Batch(blobs(count, (1, 8, 8)), torch.arange(count)), recipe)
    observation = Observation(model, update, recipe, "honest_server")
    attack = ATTACKS[name].item(**SETTINGS[name])
    check_shape(attack, observation, reconstructions(run(attack, [observation]))[0])


def test_knowledge_is_declared_and_missing_knowledge_is_refused(attack: Attack, model: GlobalModel) -> None:
    assert attack.requires() | attack.uses() <= set(KNOWLEDGE)


def test_gradinv_with_given_labels_needs_them(
    observations: list[Observation], model: GlobalModel, observe: Observe, blobs: Any
) -> None:
    attack = GradInv(iterations=5, labels="given")
    assert attack.requires() == {"labels"}
    result = run(attack, observations[:1])[0]
    assert isinstance(result, Failure)
    assert "labels" in result.reason
    granted = observe(model, blobs(1, (1, 8, 8)), torch.tensor([1]), knows=Knowledge(labels=torch.tensor([1])))
    labels = reconstructions(run(attack, [granted]))[0].labels
    assert labels is not None
    assert labels.tolist() == [1]


@pytest.mark.parametrize("kind", ["gradient", "delta", "weights"])
@pytest.mark.parametrize("withheld", [False, True], ids=["recipe known", "recipe withheld"])
def test_what_is_refused_at_once_is_what_would_fail(
    attack: Attack, kind: Any, withheld: bool, observations: list[Observation], as_kind: Any
) -> None:
    (seen,) = observations[:1]
    seen = seen if kind == "gradient" else as_kind(seen, kind, 0.01)
    seen = replace(seen, recipe=None if withheld else seen.recipe)
    reason = attack.why_not(seen.model, seen.recipe, seen.update.kind, seen.examples)
    (result,) = run(attack, [seen])
    assert (reason is None) == isinstance(result, Reconstruction), (reason, result)
    assert reason is None or (withheld and "withheld" in reason)


@pytest.mark.parametrize("recipe", [None, Recipe(batch_size=2)], ids=["recipe withheld", "recipe known"])
def test_multi_label_batches_are_refused_at_once_where_they_would_fail(
    recipe: Recipe | None, make_model: Any, dense_net: Any, observe: Observe, blobs: Any, multi_label: Any
) -> None:
    model = make_model(dense_net(64, 24), (1, 8, 8), task=multi_label(3))
    seen = observe(model, blobs(2, (1, 8, 8)), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
    seen = replace(seen, recipe=recipe)
    attack = GradInv(iterations=2)
    assert "multi-label" in (attack.why_not(model, recipe, "gradient", 2) or "")
    assert attack.why_not(model, recipe, "gradient", 1) is None
    assert isinstance(run(attack, [seen])[0], Failure)


@pytest.mark.parametrize("name", ATTACKS.names())
def test_presets_are_valid_settings(name: str) -> None:
    presets = ATTACKS[name].item.presets
    assert {"published", "quick"} <= set(presets)
    for values in presets.values():
        ATTACKS[name].item(**values)


@pytest.mark.parametrize(
    ("name", "convention"),
    [
        ("cpl", "range_0"),
        ("dlg", "range_1_8bit"),
        ("feature_readout", "range_1"),
        ("first_layer_readout", "range_1"),
        ("gradinv", "range_255_normalized"),
        ("gradinversion", "range_255_normalized"),
        ("idlg", "range_0"),
        ("maximum_a_posteriori", "range_1"),
    ],
)
def test_legacy_scores_follow_the_source_and_are_plain_without_one(name: str, convention: str) -> None:
    assert ATTACKS[name].item.legacy_convention == convention


@pytest.mark.parametrize("name", ATTACKS.names())
def test_descriptions_say_what_and_whence(name: str) -> None:
    entry = ATTACKS[name]
    assert len(entry.summary) > 20
    assert entry.paper
    assert entry.limits
    assert entry.item.__doc__

"""Recipes, tasks, registries and random streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import nn

from medpfl.core.domain import KNOWLEDGE, ORACLES, GlobalModel, Recipe
from medpfl.core.errors import InputError, MedPFLError, Refused, SpecError, StoreError
from medpfl.core.registry import Registry
from medpfl.core.seeding import content_hash, derive_seed, generator
from medpfl.core.tasks import MultiLabel, SingleLabel


def test_streams_with_the_same_keys_repeat_and_others_differ() -> None:
    keys = [("victims", 0, "brain"), ("victims", 1, "brain"), ("victims", 0, "chest"), ("model", 0, "brain")]
    drawn = [torch.rand(8, generator=generator(*key)) for key in keys]
    for index, key in enumerate(keys):
        assert torch.equal(drawn[index], torch.rand(8, generator=generator(*key)))
        assert not any(torch.equal(drawn[index], other) for other in drawn[index + 1 :])


def test_keys_do_not_run_into_each_other() -> None:
    assert derive_seed("a", "b", "c") != derive_seed("a", "bc")
    assert derive_seed("a", 1, 11) != derive_seed("a", 11, 1)
    assert derive_seed("a", {"x": 1, "y": 2}) == derive_seed("a", {"y": 2, "x": 1})


@given(st.text(), st.lists(st.integers()))
def test_seeds_fit_a_generator(stream: str, keys: list[int]) -> None:
    seed = derive_seed(stream, *keys)
    assert 0 <= seed < 2**63
    assert torch.Generator().manual_seed(seed).initial_seed() == seed


def test_content_hashes_ignore_the_order_of_keys_only() -> None:
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1})
    assert content_hash({"a": 1, "b": [1, 2]}) != content_hash({"a": 1, "b": [2, 1]})


def test_a_registry_refuses_a_second_entry_and_suggests_for_unknown_names() -> None:
    registry: Registry[type[Any]] = Registry("attack")

    @registry.register("gradinv", summary="inverts gradients", paper="somebody 2020")
    class Attack:
        pass

    assert registry["gradinv"].item is Attack
    assert registry["gradinv"].paper == "somebody 2020"
    assert "gradinv" in registry
    assert [entry.name for entry in registry] == ["gradinv"]
    with pytest.raises(ValueError, match="twice"):
        registry.add("gradinv", Attack, summary="again")
    with pytest.raises(SpecError, match="unknown attack 'gradinvs': did you mean 'gradinv'"):
        registry["gradinvs"]


@pytest.mark.parametrize("error", [SpecError, StoreError, Refused])
def test_errors_share_one_root_and_refusals_are_not_input_errors(error: type[MedPFLError]) -> None:
    assert issubclass(error, MedPFLError)
    assert issubclass(error, InputError) is (error is not Refused)


def test_single_label_loss_is_cross_entropy_for_indices_and_soft_labels() -> None:
    output = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]], dtype=torch.float64)
    labels = torch.tensor([1, 0])
    probabilities = output.exp() / output.exp().sum(1, keepdim=True)
    expected = -(probabilities[0, 1].log() + probabilities[1, 0].log()) / 2
    task = SingleLabel(3)
    assert float(task.loss(output, labels)) == pytest.approx(float(expected))
    assert float(task.loss(output, task.encode(labels))) == pytest.approx(float(expected))


def test_multi_label_loss_is_the_mean_binary_cross_entropy() -> None:
    output = torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    target = torch.tensor([[1.0, 0.0]])
    p = 1 / (1 + (-output).exp())
    expected = -(p[0, 0].log() + (1 - p[0, 1]).log()) / 2
    assert float(MultiLabel(2).loss(output, target)) == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("values", "identifier", "images"),
    [
        ({}, "gradient-b1", 1),
        ({"batch_size": 4}, "gradient-b4", 4),
        ({"update": "delta", "local_steps": 4, "batch_size": 8}, "delta-s4-b8", 32),
        ({"update": "weights", "local_steps": 2, "epochs": 3, "batch_size": 8, "images": 10}, "weights-s2-e3-b8", 10),
    ],
)
def test_recipes_name_themselves_and_know_how_many_images_a_victim_holds(
    values: dict[str, Any], identifier: str, images: int
) -> None:
    recipe = TypeAdapter(Recipe).validate_python(values)
    assert (recipe.default_id, recipe.private_images) == (identifier, images)


@pytest.mark.parametrize(
    "values", [{"batch_size": 0}, {"learning_rate": 0}, {"update": "grad"}, {"momentum": 1.0}, {"batchsize": 2}]
)
def test_recipes_refuse_impossible_values_and_unknown_keys(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Recipe).validate_python(values)


def test_a_global_model_runs_on_its_own_tensors_and_never_on_the_template() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    parameters = {"1.weight": torch.ones(2, 4), "1.bias": torch.tensor([0.0, 1.0])}
    model = GlobalModel("dense", module, parameters, {}, {}, SingleLabel(2), (1, 2, 2))
    output, buffers = model.forward(torch.ones(3, 1, 2, 2))
    assert output.tolist() == [[4.0, 5.0]] * 3
    assert buffers == {}
    other, _ = model.forward(torch.ones(1, 1, 2, 2), parameters={**parameters, "1.bias": torch.zeros(2)})
    assert other.tolist() == [[4.0, 4.0]]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert model.parameter_count == 10
    assert model.to(torch.float64).parameters["1.weight"].dtype == torch.float64


def test_every_oracle_is_a_kind_of_knowledge_and_marked_as_one() -> None:
    assert set(KNOWLEDGE) >= ORACLES
    assert {name for name, meaning in KNOWLEDGE.items() if "(oracle)" in meaning} == ORACLES

"""MONAI's client filters: called in the order in which `MonaiAlgo` calls them, around a plain PyTorch training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("monai.fl.utils.filters")

from monai.bundle import ConfigParser
from monai.fl.client.monai_algo import compute_weight_diff
from monai.fl.utils.constants import WeightType
from monai.fl.utils.exchange_object import ExchangeObject

from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.errors import InputError
from medpfl.core.tasks import SingleLabel
from medpfl.defenses import DPSGD, Clip, Gaussian
from medpfl.integrations.common.audit_log import AuditLog
from medpfl.integrations.monai import DefenseFilter, GateFilter, Memory, ReceivedFilter, VettingFilter, Withheld
from medpfl.models import prepare

RECIPE = Recipe(update="weights", batch_size=16, learning_rate=0.1)
KINDS = pytest.mark.parametrize("kind", [WeightType.WEIGHTS, WeightType.WEIGHT_DIFF])


def module(width: int = 400) -> nn.Module:
    """A net whose first layer gives single images back, with batch norm behind it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(144, width), nn.ReLU(), nn.Linear(width, 2))


def agreed(net: nn.Module) -> GlobalModel:
    return prepare(net, name="dense", image_shape=(1, 12, 12), task=SingleLabel(2))


def sent(net: nn.Module) -> ExchangeObject:
    return ExchangeObject(weights={name: tensor.clone() for name, tensor in net.state_dict().items()},
                          weight_type=WeightType.WEIGHTS)  # fmt: skip


def client(net: nn.Module, data: ExchangeObject, pre: list[Any], post: list[Any], batch: Batch, kind: Any) -> Any:
    """One round as `MonaiAlgo.train` and `get_weights` have it, with one step of SGD for the trainer."""
    for one in pre:
        data = one(data, {})
    net.load_state_dict(data.weights)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss: Any = nn.functional.cross_entropy(net(batch.images), batch.targets)
    loss.backward()
    optimizer.step()
    weights: Any = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    if kind == WeightType.WEIGHT_DIFF:
        weights = compute_weight_diff(data.weights, weights)
    answer = ExchangeObject(weights=weights, weight_type=kind, statistics={"num_executed_iterations": 1})
    for one in post:
        answer = one(answer, {})
    return answer


def change(answer: ExchangeObject, data: ExchangeObject) -> torch.Tensor:
    base = dict.fromkeys(data.weights, 0) if answer.weight_type == WeightType.WEIGHT_DIFF else data.weights
    return torch.cat([(torch.as_tensor(answer.weights[name]) - base[name]).flatten() for name in data.weights])


@KINDS
def test_a_defense_clips_the_change_whatever_kind_of_weights_leave(batch: Batch, kind: Any) -> None:
    net, memory = module(), Memory()
    data = sent(net)
    plain = client(net, data, [], [], batch, kind)
    clipped = client(
        net, data, [ReceivedFilter(memory)], [DefenseFilter(Clip(bound=0.01), memory, agreed(module()))], batch, kind
    )
    assert float(change(plain, data).norm()) > 0.05
    assert float(change(clipped, data).norm()) == pytest.approx(0.01, rel=1e-3)
    assert torch.allclose(change(clipped, data) / 0.01, change(plain, data) / change(plain, data).norm(), atol=1e-3)
    assert (clipped.weight_type, clipped.statistics) == (kind, {"num_executed_iterations": 1})


def test_arrays_stay_arrays_and_noise_is_fresh_in_every_round() -> None:
    memory = Memory()
    data = ExchangeObject(weights={"w": torch.zeros(500).numpy()}, weight_type=WeightType.WEIGHTS)
    ReceivedFilter(memory)(data)
    filtered = DefenseFilter(Gaussian(std=0.5), memory)
    first, second = (filtered(data).weights["w"] for _ in range(2))
    assert type(first) is type(data.weights["w"])
    assert 0.4 < first.std() < 0.6
    assert (first != second).all()
    assert memory.state.rounds == 2


@KINDS
def test_the_gate_withholds_an_update_that_gives_images_back(batch: Batch, tmp_path: Path, kind: Any) -> None:
    net, memory = module(), Memory()
    log = AuditLog(tmp_path / "log.jsonl")
    gate = GateFilter(agreed(module()), batch, RECIPE, memory, log=log)
    with pytest.raises(Withheld, match=r"^withheld$"):
        client(net, sent(net), [ReceivedFilter(memory)], [gate], batch, kind)
    (line,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (line["decided_by"], line["outcome"]) == ("leakage_gate", "withheld")
    assert "images come back" in str(line["reasons"])


@KINDS
def test_the_gate_lets_an_update_pass_whose_noise_hides_the_images(batch: Batch, kind: Any) -> None:
    net, memory = module(), Memory()
    noise = DefenseFilter(Gaussian(std=0.1), memory, agreed(module()), seed=1)
    gate = GateFilter(agreed(module()), batch, RECIPE, memory)
    data = sent(net)
    answer = client(net, data, [ReceivedFilter(memory)], [noise, gate], batch, kind)
    assert float(change(answer, data).std()) == pytest.approx(0.1, rel=0.05)


def test_an_honest_model_is_trained_on_and_a_crafted_one_is_not(batch: Batch) -> None:
    net, memory = module(), Memory()
    vetting = VettingFilter(agreed(module()), memory)
    assert vetting(sent(net)) is not None
    assert memory.received is not None
    crafted = sent(net)
    crafted.weights["1.weight"] = torch.full((400, 144), 1 / 144)
    crafted.weights["1.bias"] = -torch.linspace(0.3, 0.7, 400)
    with pytest.raises(Withheld):
        vetting(crafted)
    assert memory.received is None
    assert memory.withheld == [False, True]


def test_after_too_many_withheld_rounds_even_an_honest_model_is_not_trained_on() -> None:
    net, memory = module(), Memory(withheld=[True, True, True])
    with pytest.raises(Withheld):
        VettingFilter(agreed(module()), memory)(sent(net))


@pytest.mark.parametrize("broken", ["no weights", "objects", "kind", "optimizer", "statistics", "inside", "unknown"])
@pytest.mark.parametrize("what", ["defense", "gate"])
def test_what_they_cannot_look_at_is_not_sent(batch: Batch, what: str, broken: str) -> None:
    net, memory = module(8), Memory()
    ReceivedFilter(memory)(sent(net))
    if what == "gate":
        one: Any = GateFilter(agreed(module(8)), batch, RECIPE, memory)
    else:
        one = DefenseFilter(Clip(bound=1.0), memory)
    data = sent(net)
    if broken == "no weights":
        data.weights = None
    elif broken == "objects":
        data.weights = {"1.weight": object()}
    elif broken == "kind":
        data.weight_type = None
    elif broken == "optimizer":
        data.optim = {"momentum": torch.ones(3)}
    elif broken == "statistics":
        data.statistics = {"batch": batch.images}
    elif broken == "inside":
        data["images"] = batch.images
    else:
        data.weights["other"] = torch.ones(2)
    with pytest.raises(Withheld):
        one(data)


def test_nothing_is_sent_where_nobody_saw_what_came() -> None:
    with pytest.raises(Withheld):
        DefenseFilter(Clip(bound=1.0), Memory())(sent(module(8)))


def test_defenses_inside_training_and_impossible_recipes_are_refused_at_once(batch: Batch) -> None:
    with pytest.raises(InputError, match="inside training"):
        DefenseFilter(DPSGD(), Memory())
    with pytest.raises(InputError, match="recipe"):
        GateFilter(agreed(module(8)), batch, Recipe(update="gradient", local_steps=2), Memory())


def test_a_bundles_configuration_builds_them_around_one_memory() -> None:
    parser = ConfigParser(
        {
            "memory": {"_target_": "medpfl.integrations.monai.Memory"},
            "clip": {"_target_": "medpfl.defenses.Clip", "bound": 0.5},
            "pre_filters": [{"_target_": "medpfl.integrations.monai.ReceivedFilter", "memory": "@memory"}],
            "post_weight_filters": [
                {"_target_": "medpfl.integrations.monai.DefenseFilter", "defense": "@clip", "memory": "@memory"}
            ],
        }
    )
    (first,), (last,) = (parser.get_parsed_content(name) for name in ("pre_filters", "post_weight_filters"))
    data = ExchangeObject(weights={"w": torch.zeros(9)}, weight_type=WeightType.WEIGHTS)
    first(data)
    data.weights = {"w": torch.ones(9)}
    assert float(last(data).weights["w"].norm()) == pytest.approx(0.5, rel=1e-4)

"""Defenses inside an audit: another architecture, refused combinations."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic.dataclasses import dataclass

from medpfl.audit.grid import cells
from medpfl.audit.materials import Materials
from medpfl.audit.rounds import broadcast, client_round
from medpfl.audit.runner import run_audit
from medpfl.audit.spec import parse_spec
from medpfl.core.config import STRICT
from medpfl.core.domain import GlobalModel, Recipe
from medpfl.core.errors import Refused
from medpfl.defenses import DEFENSES, Defense

DATA = {"name": "films", "reader": "phantom", "kind": "chest", "count": 30, "size": 16, "victims": 2}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Halved(Defense):
    """All trainable tensors at half their size; impossible for models with batch norm, unwise with Adam."""

    def model(self, model: GlobalModel) -> GlobalModel:
        if model.buffers:
            raise Refused("halving needs a model without batch norm: use lenet_dlg")
        halved = {name: tensor / 2 for name, tensor in model.parameters.items()}
        return replace(model, name="halved", parameters=halved)

    def refusals(self, model: GlobalModel, recipe: Recipe) -> list[str]:
        return ["halving under Adam does nothing: use optimizer: sgd"] if recipe.optimizer == "adam" else []


@pytest.fixture
def halved() -> Iterator[None]:
    """A defense that changes the model, for one test."""
    DEFENSES.add("halved", Halved, summary="halves")
    yield
    del DEFENSES._entries["halved"]


def plain(**changes: Any) -> dict[str, Any]:
    return {
        "data": [DATA],
        "models": [{"name": "lenet_dlg"}],
        "defenses": [{"name": "none"}, {"name": "halved"}],
        "attacks": [{"name": "cpl", "iterations": 1}],
        **changes,
    }


@pytest.mark.usefixtures("halved")
@pytest.mark.parametrize("state", ["untrained", {"trained": {"steps": 2, "batch_size": 4}}])
def test_server_and_clients_have_the_model_of_the_defense(state: Any, tmp_path: Path) -> None:
    spec = parse_spec(plain(models=[{"name": "lenet_dlg", "state": state}]), tmp_path)
    undefended, defended = cells(spec)
    materials = Materials(spec, tmp_path, {})
    before, after = materials.initial_model(undefended, 0), materials.initial_model(defended, 0)
    for name, tensor in before.parameters.items():
        assert torch.equal(after.parameters[name], tensor / 2)
    sent = broadcast(materials, defended, 0, 0).model(0)
    plain_model = broadcast(materials, undefended, 0, 0).model(0)
    assert sent.name == "halved"
    assert set(materials.trained) <= {"films/lenet_dlg/s0", "films/lenet_dlg/halved/s0"}
    assert len(materials.trained) == (0 if state == "untrained" else 2)
    assert any(not torch.equal(sent.parameters[name], plain_model.parameters[name]) for name in sent.parameters)
    updates = [client_round(materials, cell, 0, 0).update for cell in (undefended, defended)]
    assert updates[0] is not None
    assert updates[1] is not None
    name = next(iter(sent.parameters))
    assert not torch.equal(updates[0].trainable[name], updates[1].trainable[name])


@pytest.mark.usefixtures("halved")
def test_what_a_defense_refuses_is_a_refused_cell_with_the_reason(tmp_path: Path) -> None:
    recipes = [{"batch_size": 1}, {"batch_size": 1, "optimizer": "adam", "label": "adam"}]
    models = [{"name": "lenet_dlg"}, {"name": "resnet18_cifar"}]
    only = {"model": ["lenet_dlg"], "defense": ["none"]}
    attacks = [{"name": "cpl", "iterations": 1, "only": {"defense": ["halved"]}},
               {"name": "cpl", "label": "small", "iterations": 1, "only": only}]  # fmt: skip
    spec = parse_spec(plain(recipes=recipes, models=models, attacks=attacks), tmp_path)
    run_audit(spec, tmp_path / "out", workers=0)
    with (tmp_path / "out" / "cells.csv").open() as handle:
        found = {row["cell"]: (row["status"], row["reason"]) for row in csv.DictReader(handle)}
    assert len(found) == 6
    for cell, (status, reason) in found.items():
        if "halved" not in cell:
            assert status == "done"
        elif "resnet18" in cell:
            assert (status, reason) == ("refused", "halving needs a model without batch norm: use lenet_dlg")
        elif "/adam/" in cell:
            assert (status, reason) == ("refused", "halving under Adam does nothing: use optimizer: sgd")
        else:
            assert status == "done"

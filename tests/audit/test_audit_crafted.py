"""Crafted attacks in an audit: prepared once, with what was granted only, and refused where the server may not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medpfl.attacks.crafted import CraftedAttack, ServerView
from medpfl.attacks.updates import change
from medpfl.audit import execute
from medpfl.audit.clients_needed import clients_needed
from medpfl.audit.grid import Cell, cells, refusal
from medpfl.audit.materials import Materials
from medpfl.audit.plan import Plan
from medpfl.audit.preparation import prepare
from medpfl.audit.rounds import broadcast, client_round
from medpfl.audit.spec import parse_spec
from medpfl.core.domain import Broadcast, Failure, Observation, Reconstruction
from medpfl.core.session import NO_SESSION, Session

DATA = {"name": "films", "reader": "phantom", "kind": "chest", "count": 40, "size": 16, "victims": 2}


class Doubling(CraftedAttack):
    """Sends the doubled model, and remembers what it was shown (which a real attack does not)."""

    sends = "the doubled model"

    def __init__(self) -> None:
        self.views: list[ServerView] = []

    def needs(self) -> frozenset[str]:
        return frozenset({"parameters"})

    def uses(self) -> frozenset[str]:
        return frozenset({"auxiliary"})

    def prepare(self, server_view: ServerView, generator: torch.Generator) -> Broadcast:
        self.views.append(server_view)
        doubled = {name: 2 * tensor for name, tensor in server_view.model.parameters.items()}
        return Broadcast(
            (replace(server_view.model, parameters=doubled),), {"drawn": torch.rand(1, generator=generator)}
        )

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        return [Failure("only a test") for _ in observations]


def prepared_cell(tmp_path: Path, attack: CraftedAttack, threat_model: dict[str, Any]) -> tuple[Cell, Materials]:
    recipes = [{"update": "weights", "batch_size": 2}]
    plain = {"data": [DATA], "attacks": ["cpl"], "recipes": recipes, "threat_models": [threat_model]}
    spec = parse_spec(plain, tmp_path)
    (cell,) = cells(spec)
    cell = replace(cell, attack=replace(cell.attack, attack=attack))
    return cell, Materials(spec, tmp_path / "cache", clients_needed([cell]))


def test_a_crafted_model_is_prepared_once_and_sent_to_all_victims(tmp_path: Path) -> None:
    attack = Doubling()
    server = {"name": "malicious_server", "can": ["parameters"], "knows": ["auxiliary"]}
    cell, materials = prepared_cell(tmp_path, attack, server)
    first, second = (broadcast(materials, cell, 0, victim) for victim in range(2))
    assert first is second
    (view,) = attack.views
    assert (view.examples, view.clients, view.update) == (2, 1, "weights")
    assert view.can == {"parameters"}
    assert view.knowledge.auxiliary is not None
    victims = torch.cat([materials.truth(cell, 0, victim).images for victim in range(2)])
    assert float(torch.cdist(victims.flatten(1), view.knowledge.auxiliary.images.flatten(1)).min()) > 0

    observation = execute._observe(materials, cell, 0, 1, client_round(materials, cell, 0, 1))
    assert observation.broadcast is first
    honest = materials.model(cell, 0, 1).parameters
    moved = change(observation)
    for name, tensor in observation.update.trainable.items():  # one step of size 0.01 from the doubled tensors
        assert float((tensor - 2 * honest[name]).abs().max()) == pytest.approx(float(moved[name].abs().max()), abs=1e-6)
        assert float(moved[name].abs().max()) < 0.1 * float(honest[name].abs().max())
    assert not torch.equal(first.secret["drawn"], broadcast(materials, cell, 1, 0).secret["drawn"])


def test_a_crafted_attack_sees_no_knowledge_that_was_not_granted(tmp_path: Path) -> None:
    attack = Doubling()
    cell, materials = prepared_cell(
        tmp_path, attack, {"name": "malicious_server", "can": ["parameters"], "withhold": ["recipe"]}
    )
    broadcast(materials, cell, 0, 0)
    (view,) = attack.views
    assert view.recipe is None
    assert all(value is None for value in vars(view.knowledge).values())


@pytest.mark.parametrize(
    ("threat_model", "reason"),
    [
        ({"name": "malicious_server"}, "parameters (chooses the tensors that it sends)"),
        (
            {"name": "malicious_server", "can": ["architecture", "recipe"]},
            "that can more than malicious_server: parameters",
        ),
        ({"name": "honest_server"}, "needs a malicious server"),
        ({"name": "malicious_server", "can": ["parameters"]}, None),
    ],
)
def test_a_server_that_may_not_change_enough_is_refused(
    threat_model: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    cell, _ = prepared_cell(tmp_path, Doubling(), threat_model)
    found = refusal(cell)
    assert found is None if reason is None else reason in (found or "")


def test_an_honest_attack_sees_no_broadcast(tmp_path: Path) -> None:
    spec = parse_spec({"data": [DATA]}, tmp_path)
    prepared = prepare(spec, tmp_path / "cache", Plan())
    (cell,), materials = prepared.cells, prepared.materials
    update = client_round(materials, cell, 0, 0)
    observation = execute._observe(materials, cell, 0, 0, update)
    assert observation.broadcast is None
    assert observation.clients == 1

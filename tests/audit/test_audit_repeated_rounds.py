"""The same model sent several times, answered with the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medpfl.audit import execute
from medpfl.audit.clients_needed import clients_needed
from medpfl.audit.grid import cells
from medpfl.audit.materials import Materials
from medpfl.audit.rounds import client_round
from medpfl.audit.spec import parse_spec
from medpfl.core.domain import Observation

DATA = {"name": "films", "reader": "phantom", "kind": "chest", "count": 30, "size": 16, "victims": 2}


def observed(base: Path, rounds: int, defense: dict[str, Any]) -> Observation:
    plain: dict[str, Any] = {
        "data": [DATA],
        "models": [{"name": "lenet_dlg"}],
        "recipes": [{"rounds": rounds}],
        "threat_models": [{"name": "eavesdropper", "knows": ["defense"]}],
        "defenses": [defense],
        "attacks": [{"name": "gradinv", "distance": "likelihood"}],
    }
    spec = parse_spec(plain, base=base)
    (cell,) = cells(spec)
    materials = Materials(spec, base / "cache", clients_needed([cell]))
    return execute._observe(materials, cell, 0, 1, client_round(materials, cell, 0, 1))


def entries(update: Any) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in update.trainable.values()])


def test_every_round_has_fresh_noise_on_the_same_gradient(tmp_path: Path) -> None:
    assert observed(tmp_path, 1, {"name": "laplace", "scale": 0.1}).earlier == ()
    seen = observed(tmp_path, 3, {"name": "laplace", "scale": 0.1})
    clean = entries(observed(tmp_path, 1, {"name": "none"}).update)
    noise = [entries(one) - clean for one in (*seen.earlier, seen.update)]
    assert len(noise) == 3
    for place, one in enumerate(noise):
        assert float(one.abs().mean()) == pytest.approx(0.1, rel=0.05)
        for other in noise[:place]:
            assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.05


def test_what_a_client_keeps_is_carried_from_round_to_round(tmp_path: Path) -> None:
    first = observed(tmp_path, 1, {"name": "top_k", "share": 0.1, "error_feedback": True}).update
    seen = observed(tmp_path, 2, {"name": "top_k", "share": 0.1, "error_feedback": True})
    without = observed(tmp_path, 2, {"name": "top_k", "share": 0.1})
    torch.testing.assert_close(entries(seen.earlier[0]), entries(first))
    torch.testing.assert_close(entries(without.earlier[0]), entries(without.update))
    assert float((entries(seen.earlier[0]) - entries(seen.update)).norm()) > 0.1 * float(entries(first).norm())


def test_rounds_are_named_in_the_id(tmp_path: Path) -> None:
    seen = observed(tmp_path, 2, {"name": "laplace"})
    assert seen.recipe is not None
    assert seen.recipe.default_id == "gradient-b1-r2"

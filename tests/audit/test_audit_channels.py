"""Audits behind channels with several clients: who takes part, who is scored, what is refused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from medpfl.audit import parse_spec, run_audit
from medpfl.audit.plan import Plan
from medpfl.audit.preparation import prepare
from medpfl.audit.rounds import client_round
from medpfl.core.domain import Batch
from medpfl.core.errors import DataError
from medpfl.federation import client_step

FILMS = {"name": "films", "reader": "phantom", "kind": "chest", "count": 60, "size": 16, "victims": 2}


def plain(**changes: Any) -> dict[str, Any]:
    return {
        "data": [FILMS],
        "recipes": [{"batch_size": 2}],
        "channels": [{"name": "secure_sum", "clients": 3}],
        "attacks": [{"name": "gradinv", "iterations": 2, "restarts": 1}],
        **changes,
    }


def rows(folder: Path, name: str = "results.csv") -> list[dict[str, str]]:
    with (folder / name).open() as handle:
        return list(csv.DictReader(handle))


def test_the_server_sees_one_update_of_victim_and_bystanders(tmp_path: Path) -> None:
    prepared = prepare(parse_spec(plain(), tmp_path), tmp_path / "cache", Plan())
    (cell,), materials = prepared.cells, prepared.materials
    held = [[materials.client(cell, 0, victim, client) for client in range(3)] for victim in range(2)]
    assert held[0][1].items == held[1][1].items  # bystanders are the same for all victims
    assert held[0][0].items != held[1][0].items
    divided = materials.pool(cell.dataset, 0).split
    everybody = [*sum(divided.victims, ()), *sum(divided.bystanders, ())]
    pool = {*divided.training, *divided.auxiliary, *divided.null}
    assert len(set(everybody)) == len(everybody) == 2 * 2 + 2 * 2
    assert not pool & set(everybody)

    update = client_round(materials, cell, 0, 1).update
    assert update is not None
    assert update.examples == 6
    model = materials.model(cell, 0)
    images = torch.cat([one.images for one in held[1]])
    labels = torch.cat([one.labels for one in held[1]])
    whole, _ = client_step(model, Batch(images, labels), cell.recipe.recipe)
    for name, tensor in whole.trainable.items():
        torch.testing.assert_close(update.trainable[name].float(), tensor, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("score", "clients"), [("victim", ["0", "0"]), ("all", ["0", "0", "1", "1", "2", "2"])])
def test_rows_say_whose_images_they_are(score: str, clients: list[str], tmp_path: Path) -> None:
    channels = [{"name": "secagg_plus", "clients": 3, "score": score}]
    spec = parse_spec(plain(channels=channels, recipes=[{"update": "weights", "batch_size": 2}]), tmp_path)
    summary = run_audit(spec, tmp_path / "out", workers=0)
    assert summary.counts["done"] == 2
    found = rows(tmp_path / "out")
    for victim in ("0", "1"):
        own = [row for row in found if row["victim"] == victim]
        assert [row["client"] for row in own] == clients
        assert [row["position"] for row in own] == [str(place) for place in range(len(clients))]
        assert len({row["item"] for row in own}) == len({row["truth_image"] for row in own}) == len(clients)
        assert {row["candidates"] for row in own} == {"6"}
    (cell,) = rows(tmp_path / "out", "cells.csv")
    assert cell["images"] == str(2 * len(clients))


def test_an_eavesdropper_behind_a_secure_channel_is_refused(tmp_path: Path) -> None:
    servers = [{"name": "eavesdropper"}, {"name": "honest_server"}]
    prepared = prepare(parse_spec(plain(threat_models=servers), tmp_path), tmp_path / "cache", Plan())
    (reason,) = prepared.refusals.values()
    assert "eavesdropper sees nothing behind the channel secure_sum" in reason


def test_too_few_images_for_bystanders_says_how_many(tmp_path: Path) -> None:
    channels = [{"name": "secure_sum", "clients": 40}]
    with pytest.raises(
        DataError, match=r"60 images; \d+ of other patients .* 78 are needed for 39 bystanders with 2 im"
    ):
        prepare(parse_spec(plain(channels=channels), tmp_path), tmp_path / "cache", Plan())


def test_an_attack_on_single_images_is_told_how_many_images_the_mean_is_of(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "attacks": ["april"],
        "recipes": [{}],
        "models": ["vit"],
        "data": [{**FILMS, "size": 32}],
    }
    prepared = prepare(parse_spec(plain(**changes), tmp_path), tmp_path / "cache", Plan())
    assert list(prepared.refusals.values()) == ["only single images can be read, the update mixes 3"]


def test_granted_labels_are_those_of_all_images_of_the_update(tmp_path: Path) -> None:
    knowing = [{"name": "honest_server", "knows": ["labels"]}]
    attacks = [{"name": "gradinv", "labels": "given", "iterations": 2, "restarts": 1}]
    spec = parse_spec(plain(threat_models=knowing, attacks=attacks), tmp_path)
    summary = run_audit(spec, tmp_path / "out", workers=0)
    assert summary.counts == {"cases": 2, "done": 2, "failed": 0, "blocked": 0}

"""Compression, fewer tensors and CENSOR as defenses of an audit: what runs, what is refused, and bytes sent."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from medpfl.audit import parse_spec, run_audit

FILMS = {"name": "films", "reader": "phantom", "kind": "chest", "count": 40, "resolution": 24, "size": 16, "victims": 1}
TENSORS = 8
"""Of lenet_idlg."""
DEFENSES: list[Any] = [
    "none",
    "prune",
    {"name": "top_k", "error_feedback": True},
    "random_k",
    "sign",
    {"name": "quantize", "bits": 4},
    {"name": "low_rank", "rank": 1},
    {"name": "censor", "trials": 2},
    {"name": "share", "tensors": ["fc.*"], "label": "head"},
    {"name": "share", "tensors": ["body.*"], "label": "body"},
    {"name": "share", "frozen": ["body.0.*"], "label": "frozen"},
    "lora",
]


def audited(folder: Path, **changes: Any) -> list[dict[str, str]]:
    """The cells of an audit of all defenses."""
    spec = {
        "data": [FILMS],
        "models": ["lenet_idlg"],
        "recipes": [{"batch_size": 1}],
        "threat_models": [{"name": "honest_server", "knows": ["defense"]}],
        "defenses": DEFENSES,
        **changes,
    }
    run_audit(parse_spec(spec, folder), folder / "out", workers=0)
    with (folder / "out" / "cells.csv").open() as handle:
        return list(csv.DictReader(handle))


def test_every_defense_runs_or_says_why_not(tmp_path: Path) -> None:
    fewer = {"only": {"defense": ["share", "lora"]}}
    attacks = [
        {"name": "gradinv", "iterations": 1, "distance": "likelihood", "label": "knowing"},
        {"name": "idlg", "iterations": 1, "restarts": 1, **fewer},
        {"name": "dlg", "iterations": 1, "restarts": 1, **fewer},
        {"name": "feature_readout", "iterations": 3, **fewer},
        {"name": "first_layer_readout", **fewer},
    ]
    cells = audited(tmp_path, attacks=attacks)
    assert {cell["failed"] for cell in cells if cell["status"] == "done"} == {"0"}
    refused = {(cell["defense"], cell["attack"]): cell["reason"] for cell in cells if cell["status"] == "refused"}
    body = {attack: reason for (defense, attack), reason in refused.items() if defense == "body"}
    assert "no dense layer" in body["idlg"]
    assert {"idlg", "feature_readout"} <= set(body)
    assert "dlg" not in body
    assert not [attack for defense, attack in refused if defense != "body" and attack in ("idlg", "knowing")]
    sent = {cell["defense"]: float(cell["bytes_sent"]) for cell in cells if cell["bytes_sent"]}
    entries = sent["none"] / 4
    assert sent["sign"] == pytest.approx(entries / 8 + 4 * TENSORS, abs=TENSORS)
    assert sent["quantize"] == pytest.approx(entries / 2 + 4 * TENSORS, abs=TENSORS)
    assert sent["top_k"] < 0.15 * sent["none"]
    assert sent["head"] + sent["body"] == sent["none"]
    adaptive = {cell["defense"] for cell in cells if cell["attack"] == "knowing" and cell["adaptive"] == "true"}
    assert adaptive == {cell["defense"] for cell in cells} - {"none"}


def test_local_training_behind_compression(tmp_path: Path) -> None:
    recipe = {"update": "weights", "batch_size": 1, "local_steps": 2, "learning_rate": 0.1}
    attacks = [{"name": "gradinv", "iterations": 1, "distance": "likelihood"}]
    defenses = [defense for defense in DEFENSES if defense not in ("none", "prune", "random_k")]
    cells = audited(tmp_path, recipes=[recipe], attacks=attacks, defenses=defenses)
    assert {(cell["status"], cell["failed"]) for cell in cells if cell["defense"] != "body"} == {("done", "0")}

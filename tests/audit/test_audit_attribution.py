"""Attacks that tell clients apart or change no architecture, as a user runs them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from medpfl.audit import parse_spec, run_audit
from medpfl.audit.plan import Plan
from medpfl.audit.preparation import prepare


def spec(model: str, can: list[str], attacks: list[dict[str, Any]], clients: int, **recipe: Any) -> dict[str, Any]:
    honest = [{"name": "honest_server", "knows": []}] if any(one["name"] == "sratta" for one in attacks) else []
    return {
        "data": [
            {"name": "films", "reader": "phantom", "kind": "chest", "count": 200, "resolution": 24, "size": 16, "victims": 2}
        ],
        "models": [model],
        "recipes": [{"update": "weights", "batch_size": 4, "learning_rate": 0.1, **recipe}],
        "threat_models": [
            {"name": "malicious_server", "can": can, "knows": ["auxiliary"]},
            *honest,
        ],
        "channels": [{"name": "secure_sum", "clients": clients, "score": "all"}],
        "attacks": attacks,
    }  # fmt: skip


def results(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open() as handle:
        return list(csv.DictReader(handle))


def test_the_table_says_to_which_client_loki_attributes_an_image(tmp_path: Path) -> None:
    everything = ["parameters", "architecture", "inconsistent_models"]
    attacks = [{"name": "loki", "bins": 64}]
    out = tmp_path / "out"
    run_audit(parse_spec(spec("lenet_idlg", everything, attacks, clients=3), tmp_path), out, workers=0)
    rows = results(out)
    assert len(rows) == 24
    clear = [row for row in rows if float(row["psnr"]) > 40]
    assert len(clear) >= 18
    assert {row["client"] for row in clear} == {"0", "1", "2"}
    assert all(row["client_inferred"] == row["client"] for row in clear)


def test_scale_mia_runs_where_only_parameters_can_be_changed(tmp_path: Path) -> None:
    attacks = [{"name": "scale_mia", "steps": 20, "width": 8}]
    out = tmp_path / "out"
    summary = run_audit(parse_spec(spec("cnn_fedavg", ["parameters"], attacks, clients=2), tmp_path), out, workers=0)
    assert summary.counts == {"cases": 2, "done": 2, "failed": 0, "blocked": 0}
    rows = results(out)
    assert all("decoder's own error" in row["notes"] for row in rows)
    assert {row["client_inferred"] for row in rows} == {""}


def test_what_cannot_run_is_refused_before_anything_does(tmp_path: Path) -> None:
    attacks: list[dict[str, Any]] = [
        {"name": "loki", "bins": 64},
        {"name": "scale_mia"},
        {"name": "ares"},
        {"name": "sratta", "only": {"threat_model": ["honest_server"]}},
        {"name": "loki", "label": "huge", "bins": 100_000_000},
    ]
    wanted = spec("lenet_idlg", ["parameters", "architecture", "inconsistent_models"], attacks, clients=40)
    refusals = prepare(parse_spec(wanted, tmp_path), tmp_path / "cache", Plan()).refusals
    malicious = {cell: reason for cell, reason in refusals.items() if "malicious_server" in cell}
    told = " | ".join(malicious.values())
    assert told.count("no two dense layers") == 2
    assert "GiB" in told
    (sratta,) = [reason for cell, reason in refusals.items() if "sratta" in cell]
    assert "no dense layer" in sratta

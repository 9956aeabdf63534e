"""MedLeak's relatives as a user runs them: which capabilities each needs, and results of a round beside MedLeak's."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from medpfl.audit import parse_spec, run_audit
from medpfl.audit.plan import Plan
from medpfl.audit.preparation import prepare
from medpfl.report import write_report

ATTACKS = [
    {"name": "medleak", "bins": 128, "mode": "joint"},
    {"name": "robbing_the_fed", "bins": 128, "variant": "sparse", "query": "dct"},
    {"name": "curious_abandon_honesty", "units": 128, "read": "peeling"},
    {"name": "fishing", "label": "fishing-class", "iterations": 10},
]


def spec(can: list[str], attacks: list[dict[str, Any]], channel: dict[str, Any]) -> dict[str, Any]:
    film = {
        "name": "films",
        "reader": "phantom",
        "kind": "chest",
        "count": 200,
        "resolution": 24,
        "size": 16,
        "victims": 2,
    }
    return {
        "data": [film],
        "models": ["lenet_idlg"],
        "recipes": [{"update": "weights", "batch_size": 4, "learning_rate": 0.1}],
        "threat_models": [{"name": "malicious_server", "can": can, "knows": ["auxiliary"]}],
        "channels": [channel],
        "attacks": attacks,
    }


def test_they_run_beside_medleak_and_the_report_says_what_was_sent(tmp_path: Path) -> None:
    out = tmp_path / "out"
    wanted = spec(["parameters", "architecture"], ATTACKS, {"name": "secure_sum", "clients": 2, "score": "all"})
    summary = run_audit(parse_spec(wanted, tmp_path), out, workers=0)
    assert summary.counts == {"cases": 8, "done": 8, "failed": 0, "blocked": 0}
    with (out / "results.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    for name in ("medleak", "robbing_the_fed", "curious_abandon_honesty"):
        clear = [float(row["psnr"]) > 30 for row in rows if row["attack"] == name]
        assert len(clear) == 16
        assert sum(clear) >= 8
    assert {row["oracle"] for row in rows} == {""}
    report = write_report(out).read_text(encoding="utf-8")
    for sent in (
        "an imprint block of two dense layers",
        "a first dense layer with trap weights",
        "a chosen last layer",
    ):
        assert sent in report


def test_what_each_must_be_able_to_change(tmp_path: Path) -> None:
    own = {"name": "curious_abandon_honesty", "place": "own", "label": "own"}
    separate = {"name": "fishing", "mode": "separate", "label": "fishing-separate"}
    wanted = spec(["parameters"], [*ATTACKS, own, separate], {"name": "plain"})
    refusals = prepare(parse_spec(wanted, tmp_path), tmp_path / "cache", Plan()).refusals
    text = " ".join(refusals.values())
    assert len(refusals) == 5
    assert text.count("architecture") >= 3
    assert "place: front" in text
    assert "inconsistent_models" in text

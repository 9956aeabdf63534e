"""Guards as an axis of the audit: what a blocked round leaves in the tables, and what a guard must not change."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest

from medpfl.audit import parse_spec, run_audit
from medpfl.audit.estimate import estimate
from medpfl.audit.plan import Plan
from medpfl.audit.preparation import prepare
from medpfl.core.errors import SpecError

FILMS = {
    "name": "films",
    "reader": "phantom",
    "kind": "chest",
    "count": 150,
    "resolution": 24,
    "size": 16,
    "victims": 2,
}
SERVER = {
    "name": "malicious_server",
    "can": ["parameters", "architecture", "inconsistent_models"],
    "knows": ["auxiliary"],
}
MEDLEAK = {"name": "medleak", "bins": 128, "scale": 1e-4}


def plain(**changes: Any) -> dict[str, Any]:
    return {
        "data": [FILMS],
        "models": ["lenet_idlg"],
        "recipes": [{"update": "weights", "batch_size": 4, "learning_rate": 0.1}],
        "threat_models": [SERVER],
        "guards": ["none", "leakage_gate"],
        "attacks": [MEDLEAK],
        **changes,
    }


def rows(folder: Path, name: str = "results.csv") -> list[dict[str, str]]:
    with (folder / name).open() as handle:
        return list(csv.DictReader(handle))


def by_guard(folder: Path, name: str = "results.csv") -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows(folder, name):
        found.setdefault(row["guard"], []).append(row)
    return found


def test_a_withheld_round_leaves_blocked_rows_and_nothing_of_the_images(tmp_path: Path) -> None:
    summary = run_audit(parse_spec(plain(), tmp_path), tmp_path / "out", workers=0)
    assert summary.counts == {"cases": 4, "done": 2, "failed": 0, "blocked": 2}
    found = by_guard(tmp_path / "out")
    assert {row["status"] for row in found["none"]} == {"done"}
    assert sum(row["success"] == "true" for row in found["none"]) >= 7  # what the guard had to stop
    for row in found["leakage_gate"]:
        assert (row["status"], row["success"], row["verdict"]) == ("blocked", "false", "crafted")
        assert row["psnr"] == row["reconstruction_image"] == row["candidates"] == ""
        assert "4 of 4 images come back" in row["verdict_reason"]
        assert "images" not in row["reason"]
    (cell,) = by_guard(tmp_path / "out", "cells.csv")["leakage_gate"]
    assert cell["verdicts"] == "2 crafted"
    assert by_guard(tmp_path / "out", "cells.csv")["none"][0]["verdicts"] == ""
    assert (cell["status"], cell["blocked"], cell["done"], cell["asr"]) == ("done", "8", "0", "0.0")
    pictures = {path.parts[-2] for path in (tmp_path / "out" / "images").rglob("*.png")}
    assert not any("leakage_gate" in str(path) for path in (tmp_path / "out" / "images").rglob("*.png")), pictures


def test_a_guard_that_lets_pass_changes_no_result(tmp_path: Path) -> None:
    spec = plain(
        threat_models=["honest_server"],
        recipes=[{"batch_size": 2}],
        attacks=[{"name": "dlg", "iterations": 3, "restarts": 1}],
    )
    run_audit(parse_spec(spec, tmp_path), tmp_path / "out", workers=0)
    found = by_guard(tmp_path / "out")
    assert [row["psnr"] for row in found["none"]] == [row["psnr"] for row in found["leakage_gate"]]
    assert {row["verdict"] for row in found["leakage_gate"]} == {"passed"}
    assert {row["verdict"] for row in found["none"]} == {""}


def test_behind_secure_aggregation_only_clients_with_something_to_hide_withhold(tmp_path: Path) -> None:
    """`separate`: the victim gets the module and withholds, bystanders get a dead one and send."""
    channel = {"name": "secagg_plus", "clients": 3, "score": "all"}
    attacks = [{**MEDLEAK, "scale": 1e-8, "mode": mode, "label": mode} for mode in ("separate", "joint")]
    spec = plain(channels=[channel], guards=["leakage_gate"], attacks=attacks)
    summary = run_audit(parse_spec(spec, tmp_path), tmp_path / "out", workers=0)
    assert summary.counts == {"cases": 4, "done": 2, "failed": 0, "blocked": 2}
    status = {(row["attack"], row["client"]): (row["status"], row["others_withheld"]) for row in rows(tmp_path / "out")}
    assert status["separate", "0"] == ("blocked", "0")
    assert status["separate", "1"] == status["separate", "2"] == ("done", "1")
    assert {status["joint", client] for client in "012"} == {("blocked", "2")}
    assert {row["candidate"] for row in rows(tmp_path / "out")} == {""}  # nothing came back of anybody


def test_honest_bystanders_raise_no_alarm(tmp_path: Path) -> None:
    spec = plain(
        recipes=[{"update": "weights", "batch_size": 8, "learning_rate": 0.1}],
        threat_models=["honest_server"],
        channels=[{"name": "secure_sum", "clients": 5}],
        guards=["leakage_gate", "norm_bound", "vetting"],
        attacks=[{"name": "dlg", "iterations": 1, "restarts": 1}],
    )
    run_audit(parse_spec(spec, tmp_path), tmp_path / "out", workers=0)
    found = rows(tmp_path / "out")
    assert len(found) == 3 * 2 * 40 / 5
    assert {(row["status"], row["verdict"], row["others_withheld"]) for row in found} == {("done", "passed", "0")}


def test_a_client_that_builds_the_agreed_model_finds_every_added_layer(tmp_path: Path) -> None:
    guard = {"name": "vetting", "agreed_model": True, "reference": True}
    for server, attack in ((SERVER, MEDLEAK), ("honest_server", {"name": "dlg", "iterations": 1, "restarts": 1})):
        folder = tmp_path / str(attack["name"])
        spec = plain(threat_models=[server], guards=[guard], attacks=[attack])
        run_audit(parse_spec(spec, tmp_path), folder, workers=0)
        found = rows(folder)
        if server is SERVER:
            assert {row["status"] for row in found} == {"blocked"}
            for reason in ("does not fit model 'lenet_idlg'", "unlike the reference: 'front.first.weight' is new"):
                assert all(reason in row["verdict_reason"] for row in found)
        else:
            assert {(row["status"], row["verdict"]) for row in found} == {("done", "passed")}


def test_the_guards_time_is_in_the_estimate(tmp_path: Path) -> None:
    spec = plain(guards=["none", "vetting"], channels=[{"name": "secure_sum", "clients": 4}])
    prepared = prepare(parse_spec(spec, tmp_path), tmp_path / "cache", Plan())
    without, guarded = estimate(prepared)
    assert (without.cell.guard.id, guarded.cell.guard.id) == ("none", "vetting")
    assert guarded.seconds > without.seconds + 2 * 4 * 0.005  # eight clients, none of them vetted in 5 ms


def test_a_killed_audit_goes_on_where_guards_blocked(tmp_path: Path) -> None:
    spec = parse_spec(plain(), tmp_path)
    whole = run_audit(spec, tmp_path / "whole", workers=0)
    (tmp_path / "part").mkdir()
    first = parse_spec(plain(guards=["leakage_gate"]), tmp_path)
    run_audit(first, tmp_path / "part", workers=0)
    again = run_audit(spec, tmp_path / "part", workers=0)
    assert again.computed == 1
    assert again.counts == whole.counts
    shutil.rmtree(tmp_path / "part" / "cache", ignore_errors=True)
    assert run_audit(spec, tmp_path / "part", workers=0).computed == 0

    def settled(folder: str) -> list[dict[str, str]]:
        return [{**row, "seconds": ""} for row in rows(tmp_path / folder)]

    assert settled("part") == settled("whole")


@pytest.mark.parametrize(
    ("guards", "message"),
    [
        (["leakage_gates"], "guards[0]: unknown guard 'leakage_gates': did you mean 'leakage_gate'?"),
        ([{"name": "norm_bound", "bound": -1}], "guards[0].bound"),
        ([{"name": "leakage_gate", "corelation": 0.9}], "did you mean 'correlation'?"),
        ([{"name": "leakage_gate"}, {"name": "leakage_gate", "images": 2}], "give one of them a label"),
        ([{"name": "leakage_gate", "withhold": "everything"}], "guards[0].withhold"),
    ],
)
def test_a_wrong_guard_is_one_clear_sentence(guards: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as raised:
        parse_spec(plain(guards=guards), tmp_path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_comparing_digests_stops_different_models_and_no_common_one(tmp_path: Path) -> None:
    channel = {"name": "secure_sum", "clients": 3}
    attacks = [{**MEDLEAK, "mode": mode, "label": mode} for mode in ("separate", "joint")]
    spec = plain(channels=[channel], guards=["same_model"], attacks=attacks)
    run_audit(parse_spec(spec, tmp_path), tmp_path / "out", workers=0)
    status = {row["attack"]: (row["status"], row["others_withheld"]) for row in rows(tmp_path / "out")}
    assert status == {"separate": ("blocked", "2"), "joint": ("done", "0")}

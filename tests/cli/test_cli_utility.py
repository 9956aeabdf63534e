"""`--utility` and `--limit` on the command line, and what the other commands say of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from medpfl.cli.progress import Lines

SHORT = {"rounds": 4, "clients": 2, "seeds": 1, "local_epochs": 4, "learning_rate": 0.003}
NOISE = {"name": "laplace", "scale": 10.0, "label": "huge"}


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory, write_spec: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("utility")
    data = {"name": "films", "reader": "phantom", "kind": "chest", "count": 60, "size": 16, "victims": 3}
    attack = {"name": "dlg", "iterations": 4, "restarts": 1}
    write_spec(folder, data=[data], models=["cnn3"], defenses=["none", NOISE], attacks=[attack], utility=SHORT)
    return folder


def test_an_audit_with_utility_from_the_command_to_the_report(medpfl: Callable[..., Any], audited: Path) -> None:
    spec, out = audited / "audit.yaml", audited / "out"
    assert "of it for 4 federations that measure utility" in medpfl("check", spec).out.replace("\n", " ")
    assert json.loads(medpfl("check", spec, "--json").out)["utility_seconds"] > 0
    ended = medpfl("audit", spec, "--out", out, "--workers", 0, "--limit", "ssim <= 0.99")
    assert ended.code == 0, ended
    assert "utility: 4/4 federations" in ended.err
    summary = json.loads((out / "summary.json").read_text())
    (frontier,) = summary["frontiers"]
    assert frontier["advice"] in ended.out.replace("\n", " ") or frontier["advice"][:40] in ended.out
    assert frontier["limit"] == "ssim_mean <= 0.99"
    assert {one["defense"] for one in frontier["settings"]} == {"none", "huge"}
    page = (out / "report.html").read_text()
    assert "What protection costs" in page
    assert "clients alone" in page
    assert yaml.safe_load((out / "spec.yaml").read_text())["utility"] == SHORT

    judged = medpfl("report", out, "--limit", "psnr <= 1")
    assert judged.code == 0
    assert "below psnr_mean &lt;= 1" in (out / "report.html").read_text()
    medpfl("report", out, "--limit", "pnsr <= 1").refused("--limit", "did you mean 'psnr'")
    medpfl("audit", spec, "--out", out, "--limit", "f1 <= 1").refused("unknown column 'f1'")

    shown = medpfl("show", out, "huge/none/dlg/s0/v1")
    assert "utility of its setting, auc" in shown.out
    compared = json.loads(medpfl("compare", out, out, "--json").out)
    assert {one["measure"] for one in compared["utility"]} == {"balanced_accuracy", "auc"}
    assert all(one["first"] == one["second"] for one in compared["utility"])
    assert "Utility of the models" in medpfl("compare", out, out).out


def test_the_flag_alone_measures_with_the_defaults(
    medpfl: Callable[..., Any], write_spec: Callable[..., Path], tmp_path: Path
) -> None:
    """Too few images for the defaults: the flag is read as the key would be."""
    data = {"name": "films", "reader": "phantom", "kind": "chest", "count": 8, "size": 16, "victims": 2}
    spec = write_spec(tmp_path, data=[data])
    medpfl("audit", spec, "--out", tmp_path / "out", "--workers", 0, "--utility").refused("utility: 'films' leaves")


def test_progress_of_federations_in_a_log() -> None:
    said: list[str] = []
    moment = [0.0]
    lines = Lines(said.append, every=60.0, clock=lambda: moment[0])
    for done, at in ((0.0, 0.0), (1.0, 10.0), (2.0, 20.0), (4.0, 80.0), (8.0, 90.0), (8.0, 100.0)):
        moment[0] = at
        lines.utility(done, 8)
    assert said == [
        "utility: 1/8 federations, 0 s",
        "utility: 4/8 federations, 70 s, about 2 min left",
        "utility: 8/8 federations, 80 s",
    ]

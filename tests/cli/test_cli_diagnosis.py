"""`--diagnose` on the command line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

NOISE = {"name": "laplace", "scale": 10.0, "label": "huge"}


def test_diagnose_on_demand_with_its_costs_and_without_touching_the_limit(
    medpfl: Callable[..., Any], write_spec: Callable[..., Path], tmp_path: Path
) -> None:
    attack = {"name": "idlg", "iterations": 8, "restarts": 1}
    spec = write_spec(tmp_path, models=["lenet_idlg"], defenses=[NOISE], attacks=[attack])
    out = tmp_path / "out"
    before = json.loads(medpfl("check", spec, "--json").out)
    checked = json.loads(medpfl("check", spec, "--diagnose", "--json").out)
    assert "diagnosis" not in before
    assert [row["cell"] for row in checked["cells"]] == [row["cell"] for row in before["cells"]]
    assert [row["cases"] for row in checked["diagnosis"]] == [2]
    assert "and 1 to diagnose them" in medpfl("check", spec, "--diagnose").out
    ended = medpfl("audit", spec, "--out", out, "--workers", 0, "--diagnose", "--fail-if", "asr > 0.1")
    assert ended.code == 0, ended
    assert "what limits the attack most" in ended.out
    with (out / "cells.csv").open() as handle:
        rates = {row["change"]: float(row["asr"]) for row in csv.DictReader(handle)}
    assert rates == {"": 0.0, "no_defense": 1.0}
    assert yaml.safe_load((out / "spec.yaml").read_text())["diagnose"] == {"victims": 8}
    again = medpfl("audit", out / "spec.yaml", "--out", out, "--workers", 0)
    assert again.code == 0
    assert "4 cases done" in again.out
    own = json.loads(medpfl("show", out, "s0/v1", "--json").out)
    assert [row["diagnosis_of"] for row in own] == [None]
    compared = json.loads(medpfl("compare", out, out, "--json").out)
    assert len(compared["cells"]) == 1

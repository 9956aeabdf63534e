"""Whole audits on phantoms: results, resuming, failing, extending."""

from __future__ import annotations

import csv
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from medpfl.attacks.cpl import CPL
from medpfl.audit import parse_spec, run_audit
from medpfl.core.domain import Failure
from medpfl.core.errors import StoreError

TIMING = {"seconds"}


def plain(**changes: Any) -> dict[str, Any]:
    return {
        "name": "test",
        "seed": 3,
        "data": [{"name": "films", "reader": "phantom", "kind": "chest", "count": 30, "size": 16, "victims": 3}],
        "models": [{"name": "lenet_dlg"}],
        "defenses": [{"name": "none"}, {"name": "gaussian", "std": 0.1}],
        "attacks": [{"name": "cpl", "iterations": 2}, {"name": "gradinv", "labels": "given", "iterations": 2}],
        **changes,
    }


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as handle:
        return [{key: value for key, value in row.items() if key not in TIMING} for row in csv.DictReader(handle)]


def test_an_audit_leaves_the_files_of_the_contract(tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = run_audit(parse_spec(plain(), tmp_path), out, workers=0)
    assert summary.counts == {"cases": 6, "done": 6, "failed": 0, "blocked": 0}
    for name in ("audit.sqlite", "results.csv", "cells.csv", "summary.json", "spec.yaml", "images"):
        assert (out / name).exists()
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    found = rows(out)
    assert len(found) == 6
    for row in found:
        assert (out / row["reconstruction_image"]).is_file()
        assert (out / row["truth_image"]).with_suffix(".npz").is_file()
        assert row["oracle"] == ""
        assert row["adaptive"] == "false"
    with (out / "cells.csv").open() as handle:
        cells = list(csv.DictReader(handle))
    assert [cell["status"] for cell in cells].count("refused") == 2
    assert all("labels" in cell["reason"] for cell in cells if cell["status"] == "refused")
    assert json.loads((out / "summary.json").read_text())["finished"] is True
    assert json.loads((out / "summary.json").read_text())["schema"] == 1
    assert all(list(row)[-1] == "schema" and row["schema"] == "1" for row in (*found, *cells))
    again = yaml.safe_load((out / "spec.yaml").read_text())
    assert again["environment"]["schema"] == 1
    assert parse_spec(again, out).seeds == (3,)


DEAD_NET = """
from torch import nn


def build(image_shape, classes):
    pixels = image_shape[0] * image_shape[1] * image_shape[2]
    net = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 8), nn.ReLU(), nn.Linear(8, classes))
    nn.init.constant_(net[1].bias, -100.0)
    return net
"""
"""A net whose hidden units are active for no image."""


def test_images_for_which_nothing_came_back_are_scored_against_mid_grey(tmp_path: Path) -> None:
    (tmp_path / "dead_net.py").write_text(DEAD_NET)
    spec = plain(
        models=[{"name": "dead", "factory": "dead_net:build"}],
        defenses=[{"name": "none"}],
        attacks=[{"name": "first_layer_readout"}],
    )
    out = tmp_path / "out"
    assert run_audit(parse_spec(spec, tmp_path), out, workers=0).counts["failed"] == 0
    for row in rows(out):
        assert (row["status"], row["candidate"], row["candidates"], row["objective"]) == ("done", "", "0", "")
        assert "no unit of '1' was active" in row["stop_reason"]
        truth = np.load((out / row["truth_image"]).with_suffix(".npz"))
        error = np.mean((truth[truth.files[0]].astype(np.float64) - 0.5) ** 2)
        assert float(row["mse"]) == pytest.approx(error, rel=1e-5)
    (cell,) = csv.DictReader((out / "cells.csv").open())
    assert (cell["done"], cell["failed"], cell["asr"], cell["complete"]) == ("3", "0", "0.0", "true")


def test_running_again_computes_nothing_and_more_cells_extend(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_audit(parse_spec(plain(), tmp_path), out, workers=0)
    before = rows(out)
    assert run_audit(parse_spec(plain(), tmp_path), out, workers=0).computed == 0
    more = plain(defenses=[*plain()["defenses"], {"name": "laplace", "scale": 0.1}])
    extended = run_audit(parse_spec(more, tmp_path), out, workers=0)
    assert extended.counts["done"] == 9
    assert [row for row in rows(out) if row["defense"] != "laplace"] == before


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"name": "other"},
        {"attacks": [{"name": "cpl", "iterations": 3}]},
        {"defenses": [{"name": "none"}]},
        {"data": [{**plain()["data"][0], "victims": 4}]},
    ],
)
def test_another_spec_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_audit(parse_spec(plain(), tmp_path), out, workers=0)
    before = rows(out)
    with pytest.raises(StoreError, match="--out"):
        run_audit(parse_spec(plain(**change), tmp_path), out, workers=0)
    assert rows(out) == before


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="not empty"):
        run_audit(parse_spec(plain(), tmp_path), tmp_path, workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_workers_do_not_change_results(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run_audit(parse_spec(plain(), tmp_path), one, workers=0)
    run_audit(parse_spec(plain(), tmp_path), two, workers=2)
    assert rows(one) == rows(two)


def test_an_attack_that_breaks_down_fails_its_case_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = CPL.reconstruct

    def breaks(self: CPL, observations: Any, generators: Any, session: Any) -> Any:
        results = original(self, observations, generators, session)
        return [Failure("no finite iterate"), *results[1:]]

    monkeypatch.setattr(CPL, "reconstruct", breaks)
    out = tmp_path / "out"
    summary = run_audit(parse_spec(plain(), tmp_path), out, workers=0)
    assert summary.counts["failed"] == 2
    assert summary.counts["done"] == 4
    failed = [row for row in rows(out) if row["status"] == "failed"]
    assert all(row["reason"] == "no finite iterate" and row["psnr"] == "" for row in failed)


def test_a_chunk_that_raises_is_run_again_case_by_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = CPL.reconstruct

    def raises(self: CPL, observations: Any, generators: Any, session: Any) -> Any:
        if len(observations) > 1:
            raise RuntimeError("too much at once")
        return original(self, observations, generators, session)

    monkeypatch.setattr(CPL, "reconstruct", raises)
    summary = run_audit(parse_spec(plain(), tmp_path), tmp_path / "out", workers=0)
    assert summary.counts["done"] == 6


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    changes = {"attacks": [{"name": "cpl", "iterations": 40}]}
    spec_path = tmp_path / "audit.yaml"
    spec_path.write_text(yaml.safe_dump(plain(**changes)))
    run_audit(parse_spec(plain(**changes), tmp_path), tmp_path / "whole", workers=0)
    command = [
        sys.executable,
        "-m",
        "medpfl",
        "audit",
        str(spec_path),
        "--out",
        str(tmp_path / "killed"),
        "--workers",
        "1",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "killed" / "images").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    finished = subprocess.run(command, capture_output=True, text=True, timeout=220, check=False)
    assert finished.returncode == 0, finished.stderr
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")

"""MedLeak at the command line: what cannot be is said in one sentence before anything runs, and nothing is lost."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Medpfl = Callable[..., Any]
WriteSpec = Callable[..., Path]

FILMS = {"name": "films", "reader": "phantom", "kind": "chest", "count": 80, "size": 16, "victims": 2}
SERVER = {
    "name": "malicious_server",
    "can": ["parameters", "architecture", "inconsistent_models"],
    "knows": ["auxiliary"],
}
RECIPE = {"update": "weights", "batch_size": 4, "learning_rate": 0.1}
MODULE = {"name": "medleak", "bins": 64, "scale": 1e-4}


def spec(**changes: Any) -> dict[str, Any]:
    return {"data": [FILMS], "recipes": [RECIPE], "threat_models": [SERVER], "attacks": [MODULE], **changes}


def refusal(ended: Any) -> str:
    """The one reason of the one refused cell."""
    assert ended.code == 0, ended
    (cell,) = json.loads(ended.out)["cells"]
    reason = cell["refused"]
    assert isinstance(reason, str)
    assert "\n" not in reason
    return reason


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        ({"bins": 1}, "attacks[0].bins"),
        ({"bins": 0}, "attacks[0].bins"),
        ({"scale": 0}, "attacks[0].scale"),
        ({"mode": "both"}, "attacks[0].mode"),
    ],
)
def test_settings_that_mean_nothing(
    attack: dict[str, Any], expected: str, medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path
) -> None:
    medpfl("check", write_spec(tmp_path, **spec(attacks=[{**MODULE, **attack}]))).refused(expected)


def test_a_module_that_does_not_fit_into_memory(medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path) -> None:
    reason = refusal(medpfl("check", write_spec(tmp_path, **spec(attacks=[{**MODULE, "bins": 10**9}])), "--json"))
    assert "GiB and this machine has" in reason


def test_no_auxiliary_images_granted(medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path) -> None:
    server = {**SERVER, "knows": []}
    reason = refusal(medpfl("check", write_spec(tmp_path, **spec(threat_models=[server])), "--json"))
    assert "auxiliary (images of other patients" in reason


def test_auxiliary_images_granted_and_none_there(medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path) -> None:
    """Eight of nine images are the victims'."""
    few = {**FILMS, "count": 9}
    reason = refusal(medpfl("check", write_spec(tmp_path, **spec(data=[few])), "--json"))
    assert "auxiliary" in reason
    assert "films" in reason


NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.last = nn.Linear(256, classes)
    def forward(self, images):
        return self.last(images.flatten(1))

class Rounds(Net):
    def forward(self, images):
        return super().forward((images * 255).round() / 255)

class LooksUp(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.table = nn.Embedding(256, classes)
    def forward(self, images):
        return self.table((images * 255).long().clamp(0, 255)).flatten(1, 3).mean(dim=1)
"""


@pytest.mark.parametrize("name", ["Rounds", "LooksUp"])
def test_a_model_whose_input_takes_no_module(
    name: str, medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    reason = refusal(medpfl("check", write_spec(tmp_path, **spec(models=[{"factory": f"nets:{name}"}])), "--json"))
    assert "no derivative by its input" in reason


def test_a_client_whose_training_diverges_fails_alone(medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path) -> None:
    """float32 weights overflow at this learning rate; the other recipe's cases go on."""
    recipes = [RECIPE, {**RECIPE, "learning_rate": 1e38, "local_steps": 2, "label": "diverging"}]
    path = write_spec(tmp_path, **spec(recipes=recipes))
    ended = medpfl("audit", path, "--out", tmp_path / "out", "--workers", 0)
    assert ended.code == 3
    assert "Traceback" not in ended.out + ended.err
    with (tmp_path / "out" / "results.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    status = {row["recipe"]: row["status"] for row in rows}
    assert status == {"weights-s1-b4": "done", "diverging": "failed"}
    assert {row["reason"] for row in rows if row["status"] == "failed"} == {
        "the client's update is not finite: its own training diverged, nothing was attacked"
    }


def test_check_tells_the_memory_of_a_round_and_the_channel_takes_its_own(
    medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path
) -> None:
    channels = ["plain", {"name": "secagg_plus", "clients": 2}]
    attacks = [{**MODULE, "bins": bins, "label": f"k{bins}"} for bins in (64, 4096)]
    ended = medpfl("check", write_spec(tmp_path, **spec(channels=channels, attacks=attacks)), "--json")
    told = {
        cell["cell"].split("/")[4] + cell["cell"].split("/")[-1]: cell["memory_bytes"]
        for cell in json.loads(ended.out)["cells"]
    }
    entries = (4096 - 64) * (2 * 256 + 1)
    assert told["plaink4096"] - told["plaink64"] >= 32 * entries
    assert told["secagg_plusk4096"] - told["secagg_plusk64"] >= 48 * entries

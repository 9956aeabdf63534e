"""MedLeak as a user runs it: the spec of the contract, the grid with its reasons, results, pictures and plain words."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medpfl.audit import parse_spec, run_audit
from medpfl.audit.context import describe
from medpfl.audit.estimate import estimate
from medpfl.audit.plan import Plan
from medpfl.audit.preparation import prepare
from medpfl.report import settings, wording, write_report
from medpfl.report.loading import load_audit

FILMS = {
    "name": "films",
    "reader": "phantom",
    "kind": "chest",
    "count": 200,
    "resolution": 24,
    "size": 16,
    "victims": 2,
}
SERVER = {
    "name": "malicious_server",
    "can": ["parameters", "architecture", "inconsistent_models"],
    "knows": ["auxiliary"],
}


def plain(**changes: Any) -> dict[str, Any]:
    return {
        "data": [FILMS],
        "models": ["lenet_idlg"],
        "recipes": [{"update": "weights", "batch_size": 4, "learning_rate": 0.1}],
        "threat_models": [SERVER],
        "channels": [{"name": "secagg_plus", "clients": 3, "score": "all"}],
        "attacks": [
            {
                "name": "medleak",
                "bins": 256,
                "mode": "separate",
                "scale": "auto",
                "queries": 1,
                "label": "separate",
            },
            {"name": "medleak", "bins": 256, "mode": "joint", "label": "joint"},
            {"name": "medleak", "bins": 256, "scale": 1, "label": "plain-recipe"},
        ],
        **changes,
    }


def rows(folder: Path, name: str = "results.csv") -> list[dict[str, str]]:
    with (folder / name).open() as handle:
        return list(csv.DictReader(handle))


def test_separate_reads_the_victim_and_joint_everybody(tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = run_audit(parse_spec(plain(), tmp_path), out, workers=0)
    assert summary.counts == {"cases": 6, "done": 6, "failed": 0, "blocked": 0}
    found = rows(out)

    def share(attack: str, own: bool) -> float:
        chosen = [row for row in found if row["attack"] == attack and (row["client"] == "0") == own]
        assert len(chosen) == (8 if own else 16)
        return float(np.mean([float(row["psnr"]) > 30 for row in chosen]))

    assert share("separate", own=True) >= 0.75  # a collision of 4 images in 256 bins is possible, two are not likely
    assert share("separate", own=False) == 0
    assert share("joint", own=True) >= 0.75
    assert share("joint", own=False) >= 0.75
    assert share("plain-recipe", own=True) == 0  # rounded away by SecAgg+
    assert {row["oracle"] for row in found} == {""}
    best = next(row for row in found if row["attack"] == "separate" and float(row["psnr"]) > 30)
    pair = [np.load((out / best[key]).with_suffix(".npz")) for key in ("truth_image", "reconstruction_image")]
    truth, image = (one[one.files[0]] for one in pair)
    assert float(np.abs(truth - image).max()) < 0.2

    cells = {cell.axes["attack"]: cell for cell in load_audit(out).cells}
    text = wording.assumptions(cells["separate"])
    assert "It sent a crafted model: two dense layers in front of the agreed one" in text
    assert (
        "Updates go through secagg_plus over 3 clients, so that only their mean arrives, clipped and rounded." in text
    )
    report = write_report(out).read_text(encoding="utf-8")
    assert "The server sent a crafted model (medleak)" in report
    assert "What the channel secagg_plus does" in report
    assert "clips it at" in report
    assert "fewer equations than unknowns" not in report


def test_an_honest_attack_sends_nothing_of_its_own() -> None:
    from medpfl.report.views import Cell

    assert settings.crafted(Cell("c", {"attack": "dlg"})) == ""
    assert settings.crafted(Cell("c", {"attack": "from another version"})) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"threat_models": ["honest_server"]}, "auxiliary"),
        ({"threat_models": [{"name": "honest_server", "knows": ["auxiliary"]}]}, "needs a malicious server"),
        ({"threat_models": [{**SERVER, "can": ["parameters"]}]}, "architecture (chooses the architecture"),
        ({"threat_models": [{**SERVER, "withhold": ["recipe"]}]}, "recipe is withheld"),
    ],
    ids=["no auxiliary", "honest", "parameters only", "recipe withheld"],
)
def test_what_it_cannot_do_is_refused_before_the_run(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    attack = {"attacks": [{"name": "medleak", "bins": 64}]}
    prepared = prepare(parse_spec(plain(**{**attack, **changes}), tmp_path), tmp_path / "cache", Plan())
    (found,) = prepared.refusals.values()
    assert reason in found


def test_time_and_memory_of_the_module_are_told_before_the_run(tmp_path: Path) -> None:
    attacks = [{"name": "medleak", "bins": bins, "label": f"k{bins}"} for bins in (64, 1024)]
    prepared = prepare(parse_spec(plain(attacks=attacks), tmp_path), tmp_path / "cache", Plan())
    small, large = estimate(prepared)
    added = 2 * (1024 - 64) * 16 * 16
    assert large.memory - small.memory >= added * 4 * 4  # sent, trained, received and differences
    assert large.seconds > small.seconds > 0


def test_the_summary_tells_crafted_models_and_channels_only_where_they_are(tmp_path: Path) -> None:
    spec = parse_spec({"data": [FILMS]}, tmp_path)
    prepared = prepare(spec, tmp_path / "cache", Plan())
    context = describe(spec, prepared.cells, prepared.materials)
    assert not any("crafted" in entry["title"] or "channel" in entry["title"] for entry in context["assumptions"])
    assert any(finding["code"] == "parameters_per_pixel" for finding in context["findings"])


def test_a_server_that_chooses_recipe_and_aggregation_is_told_of_in_results_and_report(tmp_path: Path) -> None:
    server = {**SERVER, "can": [*SERVER["can"], "recipe", "secure_aggregation"]}
    recipe = {"update": "weights", "optimizer": "adam", "learning_rate": 0.001, "batch_size": 2, "local_steps": 2}
    attacks, channels = [{"name": "medleak", "bins": 128}], [{"name": "secagg_plus", "clients": 2, "max_weight": 2}]
    spec = plain(threat_models=[server], recipes=[recipe], attacks=attacks, channels=channels)
    out = tmp_path / "out"
    summary = run_audit(parse_spec(spec, tmp_path), out, workers=0)
    assert summary.counts["failed"] == 0
    found = rows(out)
    assert float(np.mean([float(row["psnr"]) > 30 for row in found])) >= 0.75
    assert all("train in 1 local step of 4 images with learning rate 1" in row["notes"] for row in found)
    assert all("aggregate with clipping_range" in row["notes"] for row in found)
    report = write_report(out).read_text(encoding="utf-8")
    (cell,) = load_audit(out).cells
    assert "The server told clients to train in 1 local step of 4 images" in wording.assumptions(cell)
    assert "into how many local steps clients divide their images" in report
    assert "clients hold 4 images and max_weight is 2" in report

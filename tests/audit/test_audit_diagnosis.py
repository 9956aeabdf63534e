"""The diagnosis: what protects a cell is found by taking it away, beside the audit's own cells and never among them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from medpfl.attacks.idlg import IDLG
from medpfl.audit import parse_spec, run_audit
from medpfl.audit.diagnosis import is_extra, sweep
from medpfl.audit.effects import diagnosis
from medpfl.audit.entries import MARK
from medpfl.audit.estimate import estimate
from medpfl.audit.grid import cells
from medpfl.audit.limits import any_satisfies, parse_limit
from medpfl.audit.plan import Plan
from medpfl.audit.preparation import prepare
from medpfl.audit.workers import Computer
from medpfl.core.errors import SpecError, StoreError

DATA = {"name": "films", "reader": "phantom", "kind": "chest", "count": 40, "size": 16, "victims": 5}
NOISE = {"name": "laplace", "scale": 10.0, "label": "huge"}
NONE = {"name": "none"}


def plain(**changes: Any) -> dict[str, Any]:
    """Noise that hides everything from an attack that would read everything."""
    return {
        "data": [DATA],
        "models": [{"name": "lenet_idlg"}],
        "defenses": [NOISE],
        "attacks": [{"name": "idlg", "iterations": 10, "restarts": 1}],
        "diagnose": {"victims": 4},
        "limit": "asr <= 0.05",
        **changes,
    }


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open() as handle:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(handle)]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diagnosed")
    run_audit(parse_spec(plain(), folder), folder / "out", workers=0)
    return folder / "out"


def test_what_hides_the_images_is_found(finished: Path) -> None:
    (found,) = summary(finished)["diagnosis"]
    assert (found["verdict"], found["limit"]) == ("limited", "no_defense")
    (effect,) = found["changes"]
    assert effect["victims"] == 4
    assert (effect["success"]["before"], effect["success"]["after"]) == (0, 1)
    own, extra = table(finished, "cells.csv")[:2]
    if is_extra(own["cell"]):
        own, extra = extra, own
    before, after = (
        {row["victim"]: float(row["psnr"]) for row in table(finished, "results.csv") if row["cell"] == cell["cell"]}
        for cell in (own, extra)
    )
    differences = [after[victim] - before[victim] for victim in after]
    assert effect["psnr"]["difference"] == pytest.approx(np.mean(differences))
    assert min(differences) <= effect["psnr"]["low"] <= effect["psnr"]["high"] <= max(differences)
    assert min(differences) > 20


def test_its_cells_are_marked_and_in_no_headline(finished: Path, tmp_path: Path) -> None:
    rows = {row["cell"]: row for row in table(finished, "cells.csv")}
    (extra,) = [row for row in rows.values() if row["diagnosis_of"]]
    (own,) = [row for row in rows.values() if not row["diagnosis_of"]]
    assert (extra["diagnosis_of"], extra["change"]) == (own["cell"], "no_defense")
    assert (own["asr"], own["victims"], extra["asr"], extra["victims"]) == ("0.0", "5", "1.0", "4")
    assert extra["status"] == "done"
    assert {row["change"] for row in table(finished, "results.csv")} == {"", "no_defense"}
    told = summary(finished)
    assert told["limit"]["holds"] is True
    assert told["finished"] is True
    assert (told["counts"]["cells"], told["counts"]["cases"], told["counts"]["diagnosis_cases"]) == (1, 5, 4)
    again = run_audit(parse_spec(plain(), tmp_path), finished, workers=0)
    assert again.computed == 0
    assert [cell["cell"] for cell in again.cells] == [own["cell"]]
    assert not any_satisfies(parse_limit("asr > 0.5", "--fail-if"), again.cells)


def test_a_finished_audit_can_be_diagnosed_and_stays_so(finished: Path, tmp_path: Path) -> None:
    without = parse_spec(plain(diagnose=False), tmp_path)
    assert run_audit(without, tmp_path / "out", workers=0).computed == 1
    before = table(tmp_path / "out", "results.csv")
    assert {row["diagnosis_of"] for row in before} == {""}
    assert run_audit(parse_spec(plain(), tmp_path), tmp_path / "out", workers=0).computed == 1
    assert table(tmp_path / "out", "results.csv") == table(finished, "results.csv")
    assert [row for row in table(tmp_path / "out", "results.csv") if not row["change"]] == before
    assert run_audit(without, tmp_path / "out", workers=0).computed == 0
    assert summary(tmp_path / "out")["diagnosis"] == summary(finished)["diagnosis"]
    with pytest.raises(StoreError, match=r"diagnose: \{victims: 4\}, found 3"):
        run_audit(parse_spec(plain(diagnose={"victims": 3}), tmp_path), tmp_path / "out", workers=0)


def test_an_interrupted_diagnosis_goes_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Computer.run
    ran: list[Any] = []

    def stops(self: Computer, chunk: Any, *others: Any) -> Any:
        if is_extra(chunk.cell) and not ran:
            ran.append(chunk)
            raise KeyboardInterrupt
        return run(self, chunk, *others)

    monkeypatch.setattr(Computer, "run", stops)
    spec = parse_spec(plain(), tmp_path)
    with pytest.raises(BaseException, match="run the same command again"):
        run_audit(spec, tmp_path / "out", workers=0)
    (halfway,) = summary(tmp_path / "out")["diagnosis"]
    assert halfway["verdict"] == "unsure"
    assert run_audit(spec, tmp_path / "out", workers=0).computed == 1
    assert table(tmp_path / "out", "results.csv") == table(finished, "results.csv")


def test_cells_that_the_audit_has_anyway_are_not_computed_again(finished: Path, tmp_path: Path) -> None:
    both = parse_spec(plain(defenses=[NONE, NOISE]), tmp_path)
    known = cells(both)
    (change,) = sweep(both, known)
    assert change.name == "no_defense"
    assert change.cell in known
    folder = tmp_path / "out"
    run_audit(parse_spec(plain(), tmp_path), folder, workers=0)
    run_audit(both, folder, workers=0)
    assert not any(row["diagnosis_of"] for row in table(folder, "cells.csv"))
    verdicts = {found["cell"].split("/")[5]: found for found in summary(folder)["diagnosis"]}
    assert verdicts["none"]["verdict"] == "open"
    assert verdicts["huge"]["limit"] == "no_defense"
    assert verdicts["huge"]["changes"][0]["victims"] == 5


def test_what_changes_nothing_has_no_effect_at_all(tmp_path: Path) -> None:
    """The labels of single images are inferred; given ones are the same, and so are start, noise and victims."""
    noise = {"name": "laplace", "scale": 1e-4}
    spec = parse_spec(plain(defenses=[noise], attacks=[{"name": "gradinv", "iterations": 5}]), tmp_path)
    run_audit(spec, tmp_path / "out", workers=0)
    (found,) = summary(tmp_path / "out")["diagnosis"]
    effects = {effect["change"]: effect for effect in found["changes"]}
    assert found["label_accuracy"] == 1
    assert {effects["labels_given"]["psnr"][part] for part in ("difference", "low", "high")} == {0}
    assert effects["no_defense"]["psnr"]["difference"] != 0


BATCH_NORM_NET = """
from torch import nn


def build(image_shape, classes):
    places = (image_shape[1] - 2) * (image_shape[2] - 2)
    first = nn.Conv2d(1, 8, 3, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.Sigmoid(), nn.Flatten(), nn.Linear(8 * places, classes))
"""


def test_batch_statistics_hide_the_brightness_of_an_image(tmp_path: Path) -> None:
    """A single image, no padding, no bias: its brightness cancels in train mode, and everything shows in eval mode."""
    (tmp_path / "batch_norm_net.py").write_text(BATCH_NORM_NET)
    hidden = plain(
        data=[{**DATA, "size": 12, "victims": 4}],
        models=[{"factory": "batch_norm_net:build"}],
        recipes=[{"batch_norm": "train"}],
        defenses=[NONE],
        attacks=[{"name": "idlg", "iterations": 20, "restarts": 1}],
        success_threshold=0.999,
    )
    run_audit(parse_spec(hidden, tmp_path), tmp_path / "out", workers=0)
    (found,) = summary(tmp_path / "out")["diagnosis"]
    assert (found["verdict"], found["limit"]) == ("limited", "batch_norm_eval")
    (effect,) = found["changes"]
    assert effect["success"]["after"] == 1
    assert effect["psnr"]["after"] > 60
    images = tmp_path / "out" / "images"
    own = [path for path in images.rglob("*/none/none/idlg/*.npz") if MARK not in str(path.relative_to(images))]
    assert len(own) == 4
    for path in own:
        error = np.load(path)["image"] - np.load(images / "truth" / "films" / path.name)["image"]
        assert error.std() < 0.2 * np.abs(error).mean()  # off by a brightness, and by little else


def test_every_condition_that_differs_is_changed_once_and_then_all(tmp_path: Path) -> None:
    hard = plain(
        data=[{**DATA, "count": 60}],
        models=[{"name": "resnet18_cifar", "state": {"trained": {"epochs": 1}}}],
        recipes=[{"update": "delta", "local_steps": 2, "epochs": 2, "batch_size": 2, "batch_norm": "train"}],
        threat_models=[{"name": "honest_server", "withhold": ["recipe"]}],
        attacks=[{"name": "gradinv", "preset": "quick"}],
    )
    prepared = prepare(parse_spec(hard, tmp_path), tmp_path / "cache", Plan())
    (base,) = prepared.cells
    changed = {change.name: change.cell for change in prepared.changes}
    different = {
        name: {axis for axis, entry in cell.entries.items() if entry != base.entries[axis]}
        for name, cell in changed.items()
    }
    assert different == {
        "labels_given": {"threat_model", "attack"},
        "recipe_known": {"threat_model"},
        "batch_norm_eval": {"recipe"},
        "plain_gradient": {"recipe"},
        "batch_size_1": {"recipe"},
        "untrained": {"model"},
        "no_defense": {"defense"},
        "all": {"threat_model", "attack", "recipe", "model", "defense"},
    }
    assert {name for name, cell in changed.items() if cell.oracle} == {"labels_given", "all"}
    everything = changed["all"].recipe.recipe
    assert (everything.update, everything.private_images, everything.batch_norm) == ("gradient", 1, "eval")
    images = {name: cell.recipe.recipe.private_images for name, cell in changed.items()}
    assert (images["plain_gradient"], images["batch_size_1"], images["untrained"]) == (2, 2, 4)
    costs = {found.cell.id: found for found in estimate(prepared)}
    assert {costs[cell.id].cases for cell in changed.values()} == {4}


def test_what_makes_no_difference_or_cannot_run_is_not_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    easy = plain(defenses=[NONE], recipes=[{"batch_norm": "train"}])
    assert prepare(parse_spec(easy, tmp_path), tmp_path / "cache", Plan()).changes == ()
    reason = "not without noise"
    monkeypatch.setattr(IDLG, "why_not", lambda *given: reason if given[2].batch_size == 1 else None)
    batches = plain(recipes=[{"batch_size": 2}])
    run_audit(parse_spec(batches, tmp_path), tmp_path / "out", workers=0)
    (found,) = summary(tmp_path / "out")["diagnosis"]
    effects = {effect["change"]: effect for effect in found["changes"]}
    assert {name for name, effect in effects.items() if effect["status"] == "refused"} == {"batch_size_1", "all"}
    assert effects["batch_size_1"]["reason"] == reason
    assert effects["no_defense"]["victims"] == 4
    assert summary(tmp_path / "out")["counts"]["refused"] == 0


def test_cells_that_become_the_same_are_computed_once(tmp_path: Path) -> None:
    stages = [{"name": "lenet_idlg", "label": f"e{n}", "state": {"trained": {"epochs": n}}} for n in (0, 1, 2)]
    spec = parse_spec(plain(models=stages, recipes=[{"batch_size": 2}]), tmp_path)
    changes = sweep(spec, cells(spec))
    together = {change.cell.id for change in changes if change.name == "all"}
    assert len(together) == 1
    untrained = [change.cell for change in changes if change.name == "untrained"]
    assert {cell.model.id for cell in untrained} == {"e0"}
    assert all(cell in cells(spec) for cell in untrained)
    excluded = parse_spec(
        plain(defenses=[{**NONE, "only": {"model": ["lenet_dlg"]}}, NOISE], models=["lenet_dlg", "lenet_idlg"]),
        tmp_path,
    )
    (change,) = [one for one in sweep(excluded, cells(excluded)) if "lenet_idlg" in one.base]
    assert is_extra(change.cell.id)


def made_up(psnr: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The verdicts on results that are written down here: cell -> PSNR per victim; 30 dB is a success."""
    rows = [
        {"cell": cell, "case": f"{cell}/{victim}", "seed": 0, "victim": victim, "client": 0, "position": 0}
        | {"psnr": value, "ssim": value / 40, "success": value >= 30, "notes": "a; b", "stop_reason": "end"}
        for cell, values in psnr.items()
        for victim, value in enumerate(values)
    ]
    table = {
        cell: {"cell": cell, "status": "done", "oracle": "", "asr": float(np.mean([value >= 30 for value in values]))}
        | ({"diagnosis_of": "base"} if cell != "base" else {})
        for cell, values in psnr.items()
    }
    changes = [{"cell": "base", "change": name, "changed": name} for name in psnr if name != "base"]
    return diagnosis(changes, table, pd.DataFrame(rows))


LOW = [10.0, 12.0, 11.0, 9.0]


@pytest.mark.parametrize(
    ("after", "verdict", "limit"),
    [
        ({"untrained": [31.0, 33.0, 35.0, 32.0], "no_defense": [14.0, 16.0, 15.0, 13.0]}, "limited", "untrained"),
        ({"untrained": [11.0, 13.5, 11.5, 9.5], "no_defense": [14.0, 16.0, 15.0, 13.0]}, "limited", "no_defense"),
        ({"untrained": [14.0, 8.0, 15.0, 6.0], "all": [31.0, 33.0, 35.0, 32.0]}, "together", "all"),
        ({"untrained": [14.0, 8.0, 15.0, 6.0], "all": [8.0, 13.0, 11.0, 8.0]}, "unexplained", None),
        ({"untrained": [1.0, 2.0, 1.5, 0.5]}, "unexplained", None),
        ({"untrained": [31.0, 33.0, 35.0]}, "unsure", None),
        ({}, "bare", None),
    ],
)
def test_verdicts(after: dict[str, list[float]], verdict: str, limit: str | None) -> None:
    (found,) = made_up({"base": LOW, **after})
    assert (found["verdict"], found["limit"]) == (verdict, limit)


def test_nothing_limits_an_attack_that_succeeds() -> None:
    (found,) = made_up({"base": [31.0, 40.0, 33.0, 32.0], "untrained": [90.0, 90.0, 90.0, 90.0]})
    assert (found["verdict"], found["limit"]) == ("open", None)
    assert found["notes"] == [{"text": "a", "cases": 4}, {"text": "b", "cases": 4}]


@pytest.mark.parametrize("value", ["yes", 3, {"victims": 0}, {"victim": 2}])
def test_a_wrong_diagnosis_is_one_sentence(value: Any, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^diagnose"):
        parse_spec(plain(diagnose=value), tmp_path)

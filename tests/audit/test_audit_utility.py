"""Utility of an audit: what a defense costs, measured once per setting, resumed, and refused where it means nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from medpfl.audit import parse_spec, run_audit
from medpfl.audit.store import Store
from medpfl.core.errors import Interrupted, SpecError, StoreError

DATA = {"name": "films", "reader": "phantom", "kind": "chest", "count": 48, "size": 16, "victims": 2}
DEFENSES = [{"name": "none"}, {"name": "gaussian", "std": 100.0, "label": "huge"}]
UTILITY = {"rounds": 4, "clients": 2, "seeds": 2, "local_epochs": 4, "learning_rate": 0.003}

SHORT = {**UTILITY, "rounds": 1, "seeds": 1}


def plain(**changes: Any) -> dict[str, Any]:
    return {
        "data": [DATA],
        "models": [{"name": "cnn3"}],
        "defenses": DEFENSES,
        "attacks": [{"name": "idlg", "iterations": 1}],
        "utility": UTILITY,
        **changes,
    }


def cells(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "cells.csv").open() as handle:
        return {row["cell"]: row for row in csv.DictReader(handle)}


def utility(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())["utility"]
    return found


def setting(folder: Path, defense: str) -> dict[str, Any]:
    (found,) = [entry for entry in utility(folder)["settings"] if entry["defense"] == defense]
    return dict(found)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("priced")
    run_audit(parse_spec(plain(), folder), folder / "out", workers=0)
    return folder / "out"


def test_noise_that_drowns_every_gradient_costs_what_was_learnt(finished: Path) -> None:
    bare, noisy = setting(finished, "none"), setting(finished, "huge")
    assert bare["defended"]["auc"]["mean"] > 0.8
    assert noisy["defended"]["auc"]["mean"] < bare["defended"]["auc"]["mean"] - 0.1
    assert noisy["undefended"] == bare["defended"]
    lost = noisy["lost"]["auc"]
    assert lost["mean"] == pytest.approx(bare["defended"]["auc"]["mean"] - noisy["defended"]["auc"]["mean"])
    assert lost["low"] <= lost["mean"] <= lost["high"]
    assert bare["lost"]["auc"]["mean"] == 0


def test_the_tables_have_it_beside_what_it_stands_for(finished: Path) -> None:
    for cell in cells(finished).values():
        found = setting(finished, cell["defense"])["defended"]
        for name in ("balanced_accuracy", "auc"):
            columns = [float(cell[f"utility_{name}{end}"]) for end in ("_low", "", "_high")]
            assert columns == [found[name]["low"], found[name]["mean"], found[name]["high"]]
            assert columns == sorted(columns)
    entry = setting(finished, "none")
    classes = len(entry["recalls"])
    assert entry["majority"]["balanced_accuracy"] == pytest.approx(1 / classes)
    assert entry["alone"]["auc"]["mean"] is not None
    assert len(entry["clients"]) == 2
    assert entry["recipe_as_trained"]["batch_size"] == 16


def test_a_finished_audit_computes_nothing_again_and_attacks_do_not_matter(finished: Path) -> None:
    spec = parse_spec(plain(), finished.parent)
    assert run_audit(spec, finished, workers=0).computed == 0
    more = [*plain()["attacks"], {"name": "dlg", "iterations": 1}]
    summary = run_audit(parse_spec(plain(attacks=more), finished.parent), finished, workers=0)
    assert summary.computed == 2  # a chunk for each defense, no federation
    both = [cell["utility_auc"] for cell in cells(finished).values() if cell["defense"] == "huge"]
    assert len(both) == 2
    assert len(set(both)) == 1


def test_more_seeds_are_added_and_other_settings_refused(tmp_path: Path) -> None:
    one = SHORT
    out = tmp_path / "out"
    run_audit(parse_spec(plain(utility=one), tmp_path), out, workers=0)
    store = Store(out)
    with store.open():
        before = store.utility()
    run_audit(parse_spec(plain(utility={**one, "seeds": 2}), tmp_path), out, workers=0)
    with store.open():
        after = store.utility()
    assert before.items() <= after.items()
    assert len(after) == 2 * len(before)
    with pytest.raises(StoreError, match="measured with rounds: 1, found 2"):
        run_audit(parse_spec(plain(utility={**one, "seeds": 2, "rounds": 2}), tmp_path), out, workers=0)
    with pytest.raises(StoreError, match="measured with seeds: 2, found 1"):
        run_audit(parse_spec(plain(utility=one), tmp_path), out, workers=0)
    kept = run_audit(parse_spec(plain(utility=None), tmp_path), out, workers=0)
    assert kept.computed == 0
    assert utility(out)["how"]["seeds"] == 2


class Stopping:
    """Interrupts when the second federation begins."""

    def update(self, done: float, total: int, failed: int) -> None:
        pass

    def training(self, model: str, fraction: float) -> None:
        pass

    def utility(self, done: float, total: int) -> None:
        if done > 1:
            raise KeyboardInterrupt


def test_measured_later_and_stopped_in_between_it_is_the_same(tmp_path: Path) -> None:
    together, later = tmp_path / "together", tmp_path / "later"
    run_audit(parse_spec(plain(utility=SHORT), tmp_path), together, workers=0)
    run_audit(parse_spec(plain(utility=None), tmp_path), later, workers=0)
    assert utility(later) is None
    assert {cell["utility_auc"] for cell in cells(later).values()} == {""}
    with pytest.raises(Interrupted):
        run_audit(parse_spec(plain(utility=SHORT), tmp_path), later, workers=0, listener=Stopping())
    assert 0 < utility(later)["done"] < utility(later)["runs"]
    assert not json.loads((later / "summary.json").read_text())["finished"]
    run_audit(parse_spec(plain(utility=SHORT), tmp_path), later, workers=0)
    assert utility(later) == utility(together)


def test_a_federation_that_breaks_down_is_at_chance_and_says_so(tmp_path: Path) -> None:
    wild = {**SHORT, "optimizer": "sgd", "learning_rate": 1e25}
    out = tmp_path / "out"
    run_audit(parse_spec(plain(utility=wild, defenses=[{"name": "none"}]), tmp_path), out, workers=0)
    found = setting(out, "none")
    assert found["broken_down"] == 1
    assert found["defended"]["auc"]["mean"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"utility": {**UTILITY, "clients": 40}}, "images to train on and clients: 40 need one each"),
        ({"utility": {**UTILITY, "partition": "site"}}, "this data names none"),
        ({"data": [{**DATA, "count": 10, "victims": 6}]}, "so a classifier cannot be judged"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence_before_any_compute(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=expected) as error:
        run_audit(parse_spec(plain(**changes), tmp_path), tmp_path / "out", workers=0)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "results.csv").exists()


def test_a_client_with_one_class_is_named(tmp_path: Path) -> None:
    skewed = {**SHORT, "partition": "dirichlet", "concentration": 0.01, "clients": 3}
    run_audit(parse_spec(plain(utility=skewed), tmp_path), tmp_path / "out", workers=0)
    notes = " ".join(setting(tmp_path / "out", "none")["notes"])
    assert "holds images of one class only" in notes


def test_hospitals_are_the_clients_where_the_data_names_them(tmp_path: Path) -> None:
    from PIL import Image

    lines = ["path,label,site"]
    for number in range(60):
        picture = Image.new("L", (16, 16), 40 + 150 * (number % 2) + number // 4)
        picture.save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{'sick' if number % 2 else 'well'},{('North', 'South', 'West')[number % 3]}")
    (tmp_path / "films.csv").write_text("\n".join(lines))
    data = {"name": "films", "reader": "csv", "path": "films.csv", "size": 16, "victims": 2, "near_duplicates": 1.0}
    by_hospital = {**SHORT, "partition": "site"}
    spec = parse_spec(plain(data=[data], utility=by_hospital), tmp_path)
    run_audit(spec, tmp_path / "out", workers=0)
    assert len(setting(tmp_path / "out", "none")["clients"]) == 3


def test_segmentation_has_no_such_utility(tmp_path: Path) -> None:
    data = {**DATA, "kind": "brain"}
    attacks = [{"name": "dlg", "iterations": 1, "restarts": 1}]
    spec = parse_spec(
        plain(data=[data], models=[{"name": "unet_small"}], defenses=[{"name": "none"}], attacks=attacks), tmp_path
    )
    run_audit(spec, tmp_path / "out", workers=0)
    assert "this model segments" in setting(tmp_path / "out", "none")["refusal"]
    assert {cell["utility_auc"] for cell in cells(tmp_path / "out").values()} == {""}

"""Specs: what is accepted, and one clear sentence for what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medpfl.audit.grid import cells, refusal
from medpfl.audit.limits import all_satisfy, any_satisfies, parse_limit
from medpfl.audit.plan import Plan
from medpfl.audit.preparation import prepare
from medpfl.audit.spec import load_spec, parse_spec
from medpfl.core.errors import InputError

DATA = {"name": "films", "reader": "phantom", "kind": "chest", "count": 24, "victims": 2}


def spec(**changes: Any) -> dict[str, Any]:
    return {"data": [dict(DATA)], "attacks": [{"name": "cpl", "iterations": 2}], **changes}


@pytest.mark.parametrize(
    ("plain", "expected"),
    [
        (spec(modles=[]), "did you mean 'models'"),
        (spec(models=[{"name": "lenet_dgl"}]), "did you mean 'lenet_dlg'"),
        (spec(attacks=[{"name": "dgl"}]), "did you mean 'dlg'"),
        (spec(attacks=[{"name": "dlg", "iteration": 3}]), "did you mean 'iterations'"),
        (spec(attacks=[{"name": "dlg", "iterations": "many"}]), "attacks[0].iterations"),
        (spec(attacks=[{"name": "dlg", "preset": "publish"}]), "did you mean 'published'"),
        (spec(data=[{**DATA, "size": "big"}]), "data[0].size"),
        (spec(data=[{**DATA, "sizes": 32}]), "did you mean 'size'"),
        (spec(data=[{**DATA, "reader": "dicoms"}]), "did you mean 'dicom'"),
        (spec(data=[{"name": "a", "reader": "folder", "path": "./nowhere"}]), "nowhere"),
        (spec(data=[]), "data: expected a list"),
        (spec(seed=-1), "seeds: expected whole numbers"),
        (spec(seed=0, seeds=[1]), "give one of them"),
        (spec(threat_models=[{"name": "honest_server", "knows": ["label"]}]), "did you mean 'labels'"),
        (spec(threat_models=[{"name": "honest_server", "can": ["parameters"]}]), "use malicious_server"),
        (spec(threat_models=[{"name": "honest_server", "knows": [{"auxiliary": "none"}]}]), "no data entry 'none'"),
        (spec(models=[{"name": "lenet_dlg"}, {"name": "lenet_dlg", "state": "untrained_per_victim"}]), "label"),
        (spec(models=[{"name": "lenet_dlg", "state": "untraind"}]), "did you mean 'untrained'"),
        (spec(attacks=[{"name": "cpl", "only": {"modle": ["lenet_dlg"]}}]), "did you mean 'model'"),
        (spec(attacks=[{"name": "cpl", "only": {"model": ["resnet18"]}}]), "matches nothing"),
        (spec(limit="asr is small"), "expected a comparison"),
        (spec(limit="ars < 0.1"), "did you mean 'asr'"),
        (spec(utility={"round": 2}), "did you mean 'rounds'"),
        (spec(utility={"clients": 1}), "utility.clients"),
        (spec(utility={"partition": "hospital"}), "utility.partition"),
        (spec(utility=[20]), "utility: expected true, false or settings"),
        (spec(limit="f1 <= 0.05"), "unknown column 'f1'"),
        (spec(guards=[{"name": "vetting", "withhold": "all"}]), "guards[0].withhold"),
        (spec(recipes=[{"learning_rate": 0}]), "recipes[0].learning_rate"),
    ],
)
def test_a_wrong_spec_gives_one_sentence(plain: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        parse_spec(plain, tmp_path)
    message = str(error.value)
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", ""])
def test_yaml_that_is_no_spec_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "audit.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"audit\.yaml"):
        load_spec(path)


def test_the_grid_is_the_product_that_only_admits(tmp_path: Path) -> None:
    plain = spec(
        models=[{"name": "lenet_dlg"}, {"name": "lenet_idlg"}],
        defenses=[{"name": "none"}, {"name": "laplace", "scale": 0.01, "label": "noisy"}],
        attacks=[{"name": "dlg"}, {"name": "idlg", "only": {"model": ["lenet_idlg"]}}],
    )
    found = [cell.id for cell in cells(parse_spec(plain, tmp_path))]
    assert len(found) == 2 * 2 + 2
    assert "films/lenet_idlg/gradient-b1/honest_server/plain/noisy/none/idlg" in found
    assert not any("/lenet_dlg/" in cell and cell.endswith("/idlg") for cell in found)


def test_an_attack_without_its_knowledge_is_refused_and_with_it_marked_as_oracle(tmp_path: Path) -> None:
    attacks = [{"name": "gradinv", "labels": "given", "iterations": 2}]
    (without,) = cells(parse_spec(spec(attacks=attacks), tmp_path))
    assert "labels" in (refusal(without) or "")
    granted = [{"name": "honest_server", "knows": ["labels", "logits"]}]
    (granted_cell,) = cells(parse_spec(spec(attacks=attacks, threat_models=granted), tmp_path))
    assert refusal(granted_cell) is None
    assert granted_cell.oracle == "labels"


def test_limits_compare_cells() -> None:
    limit = parse_limit("asr <= 0.05", "limit")
    assert all_satisfy(limit, [{"asr": 0.0}, {"asr": None}]) is True
    assert all_satisfy(limit, [{"asr": 0.5}]) is False
    assert all_satisfy(limit, [{"asr": None}]) is None
    assert any_satisfies(parse_limit("asr > 0.05", "--fail-if"), [{"asr": 0.0}, {"asr": 0.06}])


@pytest.mark.parametrize(
    ("update", "refused"), [("gradient", set()), ("delta", {"cpl", "dlg"}), ("weights", {"cpl", "dlg"})]
)
def test_attacks_that_need_a_withheld_recipe_are_refused_before_any_compute(
    update: str, refused: set[str], tmp_path: Path
) -> None:
    plain = spec(
        recipes=[{"update": update}],
        threat_models=[{"name": "honest_server", "withhold": ["recipe"]}],
        attacks=["cpl", "dlg", "gradinv"],
    )
    prepared = prepare(parse_spec(plain, tmp_path), tmp_path / "cache", Plan())
    reasons = {cell.attack.id: prepared.refusals[cell.id] for cell in prepared.cells if cell.id in prepared.refusals}
    assert set(reasons) == refused
    assert all("withheld" in reason and update in reason for reason in reasons.values())

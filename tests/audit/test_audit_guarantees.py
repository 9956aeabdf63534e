"""Guarantees beside attacks: columns of `cells.csv` against closed forms, and what the report says of them."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import norm

from medpfl.audit import parse_spec, run_audit
from medpfl.core.errors import MissingExtra, SpecError
from medpfl.core.guarantees import Guarantee, Release
from medpfl.core.recipes import Recipe
from medpfl.defenses import Gaussian
from medpfl.report import write_report

PLAIN: dict[str, Any] = {
    "data": [{"name": "films", "reader": "phantom", "kind": "chest", "count": 40, "size": 16, "victims": 2}],
    "models": ["lenet_dlg"],
    "defenses": ["none", {"name": "laplace", "scale": 0.1}, {"name": "gaussian", "std": 2.0}],
    "attacks": [{"name": "gradinv", "iterations": 2}],
}


@pytest.fixture
def gaussian_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the defense `gaussian` promise what its noise would with clipping to 1."""

    def guarantee(self: Gaussian, recipe: Recipe, images: int) -> Guarantee:
        return Guarantee("image", "add_or_remove", (Release("gaussian", self.std),), remarks=("counts are not noised",))

    monkeypatch.setattr(Gaussian, "guarantee", guarantee)


def cells(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "cells.csv").open() as file:
        return {row["defense"]: row for row in csv.DictReader(file)}


@pytest.mark.usefixtures("gaussian_promises")
def test_columns_and_report(tmp_path: Path) -> None:
    spec = parse_spec({**PLAIN, "guarantee": {"delta": 1e-6, "rounds": 16}}, base=tmp_path)
    run_audit(spec, tmp_path / "out", workers=0)
    found = cells(tmp_path / "out")
    assert found["none"]["guarantee"] == found["laplace"]["guarantee"] == "no formal guarantee"
    assert found["laplace"]["epsilon"] == found["laplace"]["reconstruction_bound"] == ""

    row = found["gaussian"]  # sixteen releases with multiplier 2 are one with 0.5
    epsilon, delta = float(row["epsilon"]), 1e-6
    assert norm.cdf(1 - epsilon / 2) - math.exp(epsilon) * norm.cdf(-1 - epsilon / 2) == pytest.approx(delta, rel=1e-3)
    prior = float(row["prior_success"])
    assert 1 / int(row["prior_images"]) <= prior < 0.5
    assert float(row["reconstruction_bound"]) == pytest.approx(norm.cdf(norm.ppf(prior) + 2))
    assert float(row["observed_bound"]) == pytest.approx(norm.cdf(norm.ppf(prior) + 0.5))
    curve = json.loads(row["reconstruction_curve"])
    assert curve["0.1"] == pytest.approx(norm.cdf(norm.ppf(0.1) + 2))
    assert (row["composed_rounds"], row["observed_rounds"], row["privacy_unit"]) == ("16", "1", "image")
    assert row["neighbors"] == "one image more or less"
    assert float(row["no_prior_psnr"]) < 0

    html = write_report(tmp_path / "out").read_text()
    assert "Guarantees beside attacks" in html
    assert f"ε = {epsilon:.3g} at δ = 1e-06 over 16 rounds" in html
    assert "no formal guarantee" in html
    assert f"at most {math.ceil(1000 * curve['0.1']) / 10:g}%" in html
    assert "prior-aware attacker may do better" in html
    assert "counts are not noised" in html


@pytest.mark.usefixtures("gaussian_promises")
def test_other_rounds_are_computed_anew_without_attacking_again(tmp_path: Path) -> None:
    run_audit(parse_spec(PLAIN, base=tmp_path), tmp_path / "out", workers=0)
    once = cells(tmp_path / "out")["gaussian"]
    asked = parse_spec({**PLAIN, "guarantee": {"rounds": 4, "images_per_patient": 2}}, base=tmp_path)
    assert run_audit(asked, tmp_path / "out", workers=0).computed == 0
    more = cells(tmp_path / "out")["gaussian"]
    assert (once["composed_rounds"], more["composed_rounds"]) == ("1", "4")
    assert more["privacy_unit"] == "patient (up to 2 images)"
    assert float(more["epsilon"]) > 3 * float(once["epsilon"])
    assert more["ssim_mean"] == once["ssim_mean"]


def test_without_the_accountant_an_audit_runs_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases = (Release("gaussian", 1.0, sampling_rate=0.1, count=3),)
    monkeypatch.setattr(Gaussian, "guarantee", lambda *_: Guarantee("image", "add_or_remove", releases))
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    run_audit(parse_spec(PLAIN, base=tmp_path), tmp_path / "out", workers=0)
    row = cells(tmp_path / "out")["gaussian"]
    assert row["epsilon"] == ""
    assert "pip install 'medpfl[privacy]'" in row["accountant"]
    assert "epsilon was not computed" in write_report(tmp_path / "out").read_text()
    with pytest.raises(MissingExtra, match="dp-accounting"):
        run_audit(parse_spec({**PLAIN, "guarantee": {"rounds": 2}}, base=tmp_path), tmp_path / "other", workers=0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (20, "guarantee: expected a mapping"),
        ({"delta": 2}, "guarantee.delta: expected"),
        ({"round": 2}, "did you mean 'rounds'"),
    ],
)
def test_a_wrong_key_is_an_error(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec({**PLAIN, "guarantee": value}, base=tmp_path)


def test_defenses_as_they_are(tmp_path: Path) -> None:
    defenses = [
        {"name": "dp_sgd", "noise_multiplier": 1.0},
        {"name": "fed_sdp", "noise_multiplier": 1.0, "added_by": "server"},
        {"name": "local_dp", "epsilon": 2.0},
        {"compose": [{"name": "clip", "bound": 1.0}, {"name": "gaussian", "std": 2.0}], "label": "clip-gaussian"},
    ]
    spec = parse_spec({**PLAIN, "defenses": defenses, "guarantee": {"rounds": 4}}, base=tmp_path)
    run_audit(spec, tmp_path / "out", workers=0)
    found = cells(tmp_path / "out")
    assert float(found["dp_sgd"]["epsilon"]) == pytest.approx(9.997, abs=0.01)  # four times 1 is once 0.5
    assert found["dp_sgd"]["privacy_unit"] == "image"
    assert found["fed_sdp"]["privacy_unit"] == "client"
    assert found["fed_sdp"]["noise_added_by"] == "server"
    assert found["fed_sdp"]["observed_bound"] == ""  # who attacks at the server sees no noise
    assert float(found["local_dp"]["epsilon"]) <= 8.0
    assert found["local_dp"]["privacy_unit"] == "weight"
    assert float(found["local_dp"]["reconstruction_bound"]) == pytest.approx(1.0)  # all weights together say everything
    assert "weights the epsilons add up to" in found["local_dp"]["guarantee_remarks"]
    assert float(found["clip-gaussian"]["epsilon"]) == pytest.approx(4.377, abs=0.01)
    assert "which sees updates without noise" in write_report(tmp_path / "out").read_text()


@pytest.mark.usefixtures("gaussian_promises")
def test_an_attacker_who_sees_several_rounds_is_held_to_their_bound(tmp_path: Path) -> None:
    spec = parse_spec(
        {**PLAIN, "defenses": [{"name": "gaussian", "std": 2.0}], "recipes": [{"rounds": 4}]}, base=tmp_path
    )
    run_audit(spec, tmp_path / "out", workers=0)
    row = cells(tmp_path / "out")["gaussian"]
    assert (row["composed_rounds"], row["observed_rounds"]) == ("4", "4")
    prior = float(row["prior_success"])
    assert float(row["observed_bound"]) == pytest.approx(norm.cdf(norm.ppf(prior) + 1))

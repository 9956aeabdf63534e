"""Segmentation through a whole audit: what is refused, what the tables hold, pictures, and what an export leaves out."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from medpfl.audit import parse_spec, run_audit
from medpfl.audit.plan import Plan
from medpfl.audit.preparation import prepare
from medpfl.cli.export import write_export
from medpfl.core.errors import SpecError
from medpfl.metrics.masks import mask_dice
from medpfl.report import write_report

LUNGS = {"name": "lungs", "reader": "phantom", "kind": "chest", "count": 24, "size": 12, "victims": 2}
QUICK = {"name": "gradinv", "iterations": 3}
GIVEN = {**QUICK, "label": "given", "masks": "given"}


def plain(**changes: Any) -> dict[str, Any]:
    return {
        "data": [LUNGS],
        "models": ["unet_small"],
        "threat_models": [{"name": "honest_server", "knows": ["masks"]}],
        "attacks": [QUICK, GIVEN],
        **changes,
    }


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open() as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audit of an untrained and a trained U-Net, and of a classifier on the same images."""
    folder = tmp_path_factory.mktemp("segmentation")
    models = [
        "unet_small",
        {"name": "unet_small", "label": "trained", "state": {"trained": {"steps": 2, "batch_size": 4}}},
        "lenet_dlg",
    ]
    idlg = {"name": "idlg", "iterations": 1, "inner_iterations": 2, "output_error": "candidate"}
    run_audit(parse_spec(plain(models=models, attacks=[QUICK, GIVEN, idlg]), folder), folder / "out", workers=0)
    return folder / "out"


def test_masks_are_searched_or_given_and_classifiers_go_on_beside(out: Path) -> None:
    cells = {(row["model"], row["attack"]): row for row in table(out, "cells.csv")}
    for model in ("unet_small", "trained"):
        assert cells[model, "gradinv"]["status"] == cells[model, "given"]["status"] == "done"
        assert cells[model, "gradinv"]["oracle"] == ""
        assert cells[model, "given"]["oracle"] == "masks"
        assert 0 <= float(cells[model, "gradinv"]["mask_dice_mean"]) <= 1
        assert cells[model, "given"]["mask_dice_mean"] == ""
        assert "the model is trained with masks" in cells[model, "idlg"]["reason"]
    assert cells["lenet_dlg", "gradinv"]["mask_dice_mean"] == ""
    assert "segmentation models only" in cells["lenet_dlg", "given"]["reason"]
    assert cells["lenet_dlg", "idlg"]["status"] == "done"


def test_the_stored_masks_are_those_that_were_scored(out: Path) -> None:
    found = [row for row in table(out, "results.csv") if row["model"] == "unet_small" and row["attack"] == "gradinv"]
    assert len(found) == 2
    for row in found:
        masks = [
            np.load((out / row[name]).with_suffix(".npz"))["mask"] for name in ("truth_mask", "reconstruction_mask")
        ]

        true, guess = (torch.from_numpy(mask)[None] for mask in masks)
        assert true.shape == (1, 12, 12)
        assert float(mask_dice(guess, true)) == pytest.approx(float(row["mask_dice"]))
        with Image.open(out / row["truth_mask"]) as picture:
            np.testing.assert_array_equal(np.asarray(picture), 255 * masks[0])
    given = [row for row in table(out, "results.csv") if row["attack"] == "given"]
    assert all(row["truth_mask"] and not row["reconstruction_mask"] and not row["mask_dice"] for row in given)
    plain_rows = [row for row in table(out, "results.csv") if row["model"] == "lenet_dlg"]
    assert all(not row["truth_mask"] for row in plain_rows)


def test_the_report_shows_both_masks_and_an_export_without_images_none(out: Path, tmp_path: Path) -> None:
    html = write_report(out).read_text(encoding="utf-8")
    assert "true mask, given to the attack" in html
    assert "mask found, Dice" in html
    assert "Mask Dice" in html
    exported = write_export(out, tmp_path / "copy", images=False)
    assert not list(exported.rglob("*.png"))
    assert not list(exported.rglob("*.npz"))
    assert all(not row["truth_mask"] and not row["reconstruction_mask"] for row in table(exported, "results.csv"))
    assert any(row["mask_dice"] for row in table(exported, "results.csv"))
    without = (exported / "report.html").read_text(encoding="utf-8")
    assert "mask found, Dice" not in without
    assert "data:image/png" not in without


def test_data_without_masks_is_refused_for_segmentation_only(tmp_path: Path) -> None:
    for index in range(6):
        values = np.random.default_rng(index).integers(0, 256, (12, 12), dtype=np.uint8)
        (tmp_path / "scans").mkdir(exist_ok=True)
        Image.fromarray(values).save(tmp_path / "scans" / f"{index}.png")
    scans = {"name": "scans", "reader": "folder", "path": "scans", "size": 12, "victims": 1}
    spec = parse_spec(plain(data=[scans, LUNGS], models=["unet_small", "lenet_dlg"], attacks=[QUICK]), tmp_path)
    prepared = prepare(spec, tmp_path / "cache", Plan())
    (refused,) = [reason for cell, reason in prepared.refusals.items() if cell.startswith("scans/unet_small")]
    assert "'unet_small' is a segmentation model and the data 'scans' has no masks: set mask_path" in refused
    assert len(prepared.runnable) == 3


def test_paths_of_masks_start_at_the_spec_and_are_withheld(tmp_path: Path) -> None:
    for index in range(12):
        values = np.random.default_rng(index).integers(0, 256, (12, 12), dtype=np.uint8)
        for name, pixels in (("scans", values), ("drawn", (values > 128).astype(np.uint8))):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    scans = {"name": "scans", "reader": "folder", "path": "scans", "mask_path": "drawn", "size": 12, "victims": 1}
    run_audit(parse_spec(plain(data=[scans], attacks=[QUICK]), tmp_path), tmp_path / "deep" / "out", workers=0)
    stored = (tmp_path / "deep" / "out" / "spec.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(stored)["data"][0]["mask_path"] == "../../drawn"
    exported = write_export(tmp_path / "deep" / "out", tmp_path / "copy", images=False)
    assert "drawn" not in (exported / "spec.yaml").read_text(encoding="utf-8")
    assert "drawn" not in (exported / "cells.csv").read_text(encoding="utf-8")


def test_a_factory_says_that_it_segments(tmp_path: Path) -> None:
    (tmp_path / "mynets.py").write_text(
        "from torch import nn\n"
        "def net(channels, classes):\n"
        "    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.Sigmoid(), nn.Conv2d(4, classes, 1))\n"
    )
    factory = {"factory": "mynets:net", "task": "segmentation"}
    run_audit(parse_spec(plain(models=[factory]), tmp_path), tmp_path / "out", workers=0)
    assert {row["status"] for row in table(tmp_path / "out", "cells.csv")} == {"done"}
    with pytest.raises(SpecError, match=r"models\[0\]\.task: expected classification or segmentation, found 'masks'"):
        parse_spec(plain(models=[{**factory, "task": "masks"}]), tmp_path)


def test_classes_of_masks_cannot_be_set_by_hand(tmp_path: Path) -> None:
    spec = parse_spec(plain(models=[{"name": "unet_small", "classes": 5}]), tmp_path)
    with pytest.raises(SpecError, match="leave `classes` out"):
        prepare(spec, tmp_path / "cache", Plan())

"""An audit of small volumes, from NIfTI files to scores and pictures, against scikit-image."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import nibabel as annotated_nibabel
import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from medpfl.audit import parse_spec, run_audit
from medpfl.audit.images import montage
from medpfl.report import write_report

nibabel: Any = annotated_nibabel  # annotated in parts only


def write_volumes(folder: Path, count: int) -> None:
    """Ellipsoids with a bright or a dark core on noise, one class each."""
    random = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, side) for side in (20, 22, 18)), indexing="ij"))
    for name, core in (("bright", 900), ("dark", 100)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            center = random.uniform(-0.3, 0.3, 3)[:, None, None, None]
            distance = np.sqrt((((grid - center) / random.uniform(0.5, 0.9, (3, 1, 1, 1))) ** 2).sum(0))
            values = (
                np.where(distance < 1, 500, 0)
                + np.where(distance < 0.4, core - 500, 0)
                + random.normal(0, 9, distance.shape)
            )
            nibabel.save(nibabel.Nifti1Image(values.astype(np.int16), np.eye(4)), folder / name / f"{number}.nii.gz")


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("volumes")
    write_volumes(base / "heads", 8)
    spec = parse_spec(
        {
            "name": "volumes",
            "data": [{"name": "heads", "reader": "nifti", "path": "heads", "whole": True, "size": [12, 11, 13], "victims": 1}],
            "models": [{"name": "lenet_dlg"}, {"name": "cnn3", "state": {"trained": {"epochs": 1, "victims": "never"}}}],
            "recipes": [{"batch_size": 1}, {"update": "delta", "local_steps": 2, "label": "two-steps"}],
            "attacks": [
                {"name": "cpl", "iterations": 15, "only": {"model": ["lenet_dlg"], "recipe": ["gradient-b1"]}},
                {"name": "dlg", "iterations": 1, "only": {"model": ["lenet_dlg"]}},
                {"name": "idlg", "iterations": 1, "only": {"model": ["lenet_dlg"]}},
                {"name": "gradinv", "iterations": 4, "total_variation": 0.01, "median_filter_every": 2},
                {"name": "feature_readout", "iterations": 5, "only": {"recipe": ["gradient-b1"]}},
                {"name": "april", "only": {"model": ["lenet_dlg"]}},
            ],
        },
        base,
    )  # fmt: skip
    out = base / "out"
    summary = run_audit(spec, out, workers=0)
    assert summary.counts["failed"] == 0
    write_report(out)
    return out


def rows(out: Path, name: str = "results.csv") -> list[dict[str, str]]:
    with (out / name).open() as handle:
        return list(csv.DictReader(handle))


def test_scores_of_volumes_are_those_of_scikit_image(audited: Path) -> None:
    found = rows(audited)
    assert {row["attack"] for row in found} == {"cpl", "dlg", "idlg", "gradinv", "feature_readout"}
    for row in found:
        truth, reconstruction = (
            np.load((audited / row[key]).with_suffix(".npz"))["image"][0].astype(np.float64)
            for key in ("truth_image", "reconstruction_image")
        )
        assert truth.shape == (12, 11, 13)
        expected = structural_similarity(  # type: ignore[no-untyped-call]
            truth, reconstruction, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert float(row["ssim"]) == pytest.approx(expected, abs=1e-6)
        assert float(row["psnr"]) == pytest.approx(
            peak_signal_noise_ratio(truth, reconstruction, data_range=1.0),  # type: ignore[no-untyped-call]
            abs=1e-4,
        )


def test_a_volume_begins_to_come_back_and_its_label_is_read(audited: Path) -> None:
    (row,) = [row for row in rows(audited) if row["attack"] == "cpl"]
    assert float(row["psnr"]) > 15  # noise has about 6
    assert row["label_correct"] == "true"


def test_refusals_have_reasons(audited: Path) -> None:
    refused = [row for row in rows(audited, "cells.csv") if row["status"] == "refused"]
    assert {row["attack"] for row in refused} == {"april"}
    assert all(row["reason"] for row in refused)


def test_pictures_are_montages_of_slices_and_in_the_report(audited: Path) -> None:
    row = rows(audited)[0]
    volume = np.load((audited / row["truth_image"]).with_suffix(".npz"))["image"]
    with Image.open(audited / row["truth_image"]) as picture:
        shown = np.asarray(picture)
    assert shown.shape == (3 * 12 - 1, 4 * 14 - 1)
    for number in range(12):
        top, left = 12 * (number // 4), 14 * (number % 4)
        np.testing.assert_array_equal(shown[top : top + 11, left : left + 13], np.round(volume[0, number] * 255))
    assert (audited / "report.html").read_text().count("data:image/png;base64,") >= 2


def test_montages_of_deep_volumes_leave_slices_out() -> None:
    depths = np.arange(64.0).reshape(1, 64, 1, 1).repeat(2, axis=3)
    assert montage(depths)[0, ::2, ::3].tolist() == [
        [2, 6, 10, 14],
        [18, 22, 26, 30],
        [34, 38, 42, 46],
        [50, 54, 58, 62],
    ]

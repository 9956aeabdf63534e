"""Several labels per image, from a MedMNIST file with the form of ChestMNIST through a whole audit."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from medpfl.audit import parse_spec, run_audit
from medpfl.data import PhantomReader, load_dataset

CLASSES = ["effusion", "mass", "nodule", "edema"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn films with findings by chance, attacked one by one and in pairs."""
    folder = tmp_path_factory.mktemp("multi_label")
    films = load_dataset(PhantomReader(kind="chest", count=30, resolution=28), name="films", size=28, channels=1)
    pixels = (films.images[:, 0] * 255).round().byte().numpy()
    labels = (np.random.default_rng(0).random((30, len(CLASSES))) < 0.4).astype(np.uint8)
    parts = {"train": slice(20), "val": slice(20, 25), "test": slice(25, 30)}
    arrays = {f"{name}_{kind}": values[part] for name, part in parts.items() for kind, values in
              (("images", pixels), ("labels", labels))}  # fmt: skip
    np.savez(folder / "findings.npz", **arrays)  # type: ignore[arg-type]
    data = {"name": "findings", "reader": "medmnist", "path": "findings.npz", "size": 12, "victims": 2}
    spec = {
        "data": [{**data, "classes": CLASSES}],
        "models": ["lenet_dlg", {"name": "lenet_idlg", "state": {"trained": {"steps": 2}}}],
        "recipes": [{"batch_size": 1}, {"batch_size": 2}],
        "threat_models": [{"name": "honest_server", "knows": ["labels"]}],
        "attacks": [
            {"name": "dlg", "iterations": 8, "restarts": 1, "only": {"model": ["lenet_dlg"]}},
            {"name": "idlg", "iterations": 8, "restarts": 1, "only": {"model": ["lenet_dlg"]}},
            {"name": "gradinv", "iterations": 5},
            {"name": "gradinv", "iterations": 5, "labels": "given", "label": "given"},
        ],
    }
    run_audit(parse_spec(spec, folder), folder / "out", workers=0)
    return folder / "out"


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open() as handle:
        return list(csv.DictReader(handle))


def test_labels_are_inferred_of_one_image_and_refused_of_a_batch(out: Path) -> None:
    for row in table(out, "cells.csv"):
        if row["recipe"] == "gradient-b2" and row["attack"] in ("idlg", "gradinv"):
            assert row["status"] == "refused"
            assert "a multi-label batch shows how often a class occurs, not in which image" in row["reason"]
        else:
            assert row["status"] == "done", row["reason"]
            assert (row["oracle"] == "labels") == (row["attack"] == "given")


def test_every_row_holds_the_labels_of_all_classes(out: Path) -> None:
    rows = table(out, "results.csv")
    assert rows
    for row in rows:
        label, inferred = json.loads(row["label"]), json.loads(row["label_inferred"])
        assert len(label) == len(inferred) == len(CLASSES)
        assert set(label) | set(inferred) <= {0, 1}
        assert row["label_correct"] == str(label == inferred).lower()
        if row["recipe"] == "gradient-b1":
            assert row["label_correct"] == "true"


def test_single_images_come_back_with_their_labels(out: Path) -> None:
    untrained = [
        row for row in table(out, "results.csv") if (row["model"], row["recipe"]) == ("lenet_dlg", "gradient-b1")
    ]
    for row in untrained:
        if row["attack"] in ("dlg", "idlg"):
            assert float(row["psnr"]) > 35

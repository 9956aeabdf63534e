"""Data, models and checkpoints that cannot be used, at the command line: one line, a way out, exit code 2."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file
from safetensors.torch import save_file

IMAGES = 12
Medpfl = Callable[..., Any]
WriteSpec = Callable[..., Path]


def write_pngs(folder: Path) -> Path:
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (20, 20), dtype=np.uint8)).save(path)
    return folder


def write_jpeg(path: Path) -> Path:
    Image.new("L", (40, 40)).save(path)
    return path


def write_dicoms(folder: Path) -> Path:
    for number in range(IMAGES):
        shutil.copy(str(get_testdata_file("CT_small.dcm", download=False)), folder / f"{number}.dcm")
    return folder


def write_nifti(folder: Path, name: str, volume: Any = None) -> Path:
    values = np.random.default_rng(0).random((20, 20, 20)).astype(np.float32) if volume is None else volume
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / name)  # type: ignore[no-untyped-call]
    return folder / name


def write_npz(folder: Path, **arrays: Any) -> Path:
    random = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for split in ("train", "val", "test"):
        found[f"{split}_images"] = random.integers(0, 255, (10, 20, 20), dtype=np.uint8)
        found[f"{split}_labels"] = random.integers(0, 2, (10, 1), dtype=np.uint8)
    np.savez(folder / "set.npz", **(found | arrays))
    return folder


def write_csv(folder: Path, text: str = "path,label\n{rows}") -> Path:
    write_pngs(folder)
    rows = "".join(f"{'ab'[number % 2]}/{number}.png,{'ab'[number % 2]}\n" for number in range(IMAGES))
    (folder / "list.csv").write_text(text.format(rows=rows))
    return folder


def half(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


DATA: dict[str, tuple[dict[str, Any], Callable[[Path], object], tuple[str, ...]]] = {
    "no images": ({"reader": "folder"}, lambda f: f, ("is empty", "images")),
    "png": ({"reader": "folder"}, lambda f: (write_pngs(f), half(f / "a/0.png")), ("a/0.png", "truncated")),
    "png of nothing": (
        {"reader": "folder"},
        lambda f: (write_pngs(f), (f / "a/0.png").write_bytes(b"")),
        ("a/0.png", "unknown format"),
    ),
    "jpeg": (
        {"reader": "folder"},
        lambda f: half(write_jpeg(write_pngs(f) / "a/x.jpg")),
        ("a/x.jpg", "truncated"),
    ),
    "name that steers a terminal": (
        {"reader": "folder"},
        lambda f: (write_pngs(f), (f / "a" / "x\n\x1b[31m.png").write_bytes(b"")),
        ("a/x??[31m.png",),
    ),
    "dicom": ({"reader": "dicom"}, lambda f: (write_dicoms(f), half(f / "3.dcm")), ("3.dcm", "truncated")),
    "dicom cut in the header": (
        {"reader": "dicom"},
        lambda f: (write_dicoms(f), (f / "3.dcm").write_bytes((f / "3.dcm").read_bytes()[:200])),
        ("3.dcm", "truncated"),
    ),
    "dicom of something else": (
        {"reader": "dicom"},
        lambda f: (write_dicoms(f), (f / "3.dcm").write_bytes(bytes(1000))),
        ("3.dcm", "not a DICOM file", "remove it"),
    ),
    "nifti": ({"reader": "nifti"}, lambda f: half(write_nifti(f, "scan.nii")), ("scan.nii", "truncated")),
    "nifti packed": (
        {"reader": "nifti"},
        lambda f: half(write_nifti(f, "scan.nii.gz")),
        ("scan.nii.gz", "truncated"),
    ),
    "nifti with NaN": (
        {"reader": "nifti"},
        lambda f: write_nifti(f, "scan.nii", np.full((20, 20, 20), np.nan)),
        ("scan.nii", "NaN"),
    ),
    "nifti of size 0": (
        {"reader": "nifti"},
        lambda f: write_nifti(f, "scan.nii", np.zeros((0, 4, 4))),
        ("scan.nii", "(0, 4, 4)"),
    ),
    "npz": ({"reader": "medmnist", "path": "set.npz"}, lambda f: (write_npz(f), half(f / "set.npz")), ("set.npz",)),
    "npz without a key": (
        {"reader": "medmnist", "path": "set.npz"},
        lambda f: np.savez(f / "set.npz", train_labels=np.zeros((2, 1), np.uint8)),
        ("set.npz", "val_labels"),
    ),
    "npz of size 0": (
        {"reader": "medmnist", "path": "set.npz"},
        lambda f: write_npz(f, train_images=np.zeros((10, 0, 0), np.uint8)),
        ("set.npz#train/0", "size 0"),
    ),
    "npz with NaN": (
        {"reader": "medmnist", "path": "set.npz"},
        lambda f: write_npz(f, train_images=np.full((10, 20, 20), np.nan)),
        ("set.npz", "float64", "expected uint8"),
    ),
    "npz with code": (
        {"reader": "medmnist", "path": "set.npz"},
        lambda f: write_npz(f, train_images=np.array([{}] * 10, dtype=object)),
        ("set.npz", "code"),
    ),
    "csv without a column": (
        {"reader": "csv", "path": "list.csv"},
        lambda f: write_csv(f, "path,lable\n{rows}"),
        ("list.csv", "did you mean 'lable'"),
    ),
    "csv with a missing file": (
        {"reader": "csv", "path": "list.csv"},
        lambda f: write_csv(f, "path,label\n{rows}a/99.png,a\n"),
        ("list.csv', row 14", "a/99.png"),
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_data_that_cannot_be_used(case: str, medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path) -> None:
    entry, write, expected = DATA[case]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    path = Path("data") / entry.get("path", "")
    labels = {"labels": "none"} if entry["reader"] in ("dicom", "nifti") else {}
    data = {"name": "scans", "size": 16, "victims": 2, **labels, **entry, "path": str(path)}
    medpfl("check", write_spec(tmp_path, data=[data])).refused(*expected)


NETS = """
import sys
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.last = nn.Linear(256, classes)
    def forward(self, images):
        return self.last(images.flatten(1))

class Nan(Net):
    def forward(self, images):
        return super().forward(images) * float("nan")

class Pair(Net):
    def forward(self, images):
        return super().forward(images), images

class Leaves(Net):
    def forward(self, images):
        sys.exit(0)

def raises():
    raise RuntimeError("no weights\\nat all")

def leaves():
    sys.exit(0)

def nothing():
    return None

def seven():
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 7))
"""


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("no_such_module:net", ("no_such_module",)),
        ("nets_broken:net", ("nets_broken:net", "SyntaxError")),
        ("nets_leaving:net", ("nets_leaving:net", "SystemExit")),
        ("nets:missing", ("nets:missing", "has no 'missing'")),
        ("nets:raises", ("nets:raises", "RuntimeError: no weights")),
        ("nets:leaves", ("nets:leaves", "SystemExit")),
        ("nets:nothing", ("nets:nothing", "NoneType", "torch.nn.Module")),
        ("nets:seven", ("nets:seven", "(2, 7)", "(2, 3)")),
        ("nets:Nan", ("nets:Nan", "not finite")),
        ("nets:Pair", ("nets:Pair", "tuple")),
        ("nets:Leaves", ("nets:Leaves", "SystemExit")),
    ],
)
def test_a_model_that_cannot_be_used(
    factory: str,
    expected: tuple[str, ...],
    medpfl: Medpfl,
    write_spec: WriteSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_nets(tmp_path, monkeypatch)
    medpfl("check", write_spec(tmp_path, models=[{"factory": factory}])).refused(*expected)


def write_nets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "nets.py").write_text(NETS)
    (folder / "nets_broken.py").write_text("def net(:\n")
    (folder / "nets_leaving.py").write_text("import sys\nsys.exit(3)\n")
    for name in ("nets", "nets_broken", "nets_leaving"):
        monkeypatch.delitem(sys.modules, name, raising=False)


class _Code:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("pwned",))


def saved(content: Any, path: Path) -> Path:
    save = save_file if path.suffix == ".safetensors" else torch.save
    save(content, path)
    return path


WEIGHTS = {"last.weight": torch.zeros(3, 256), "last.bias": torch.zeros(3)}

CHECKPOINTS: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "cut state dict": ("net.pt", lambda path: half(saved(WEIGHTS, path)), ("truncated",)),
    "cut safetensors": ("net.safetensors", lambda path: half(saved(WEIGHTS, path)), ("truncated",)),
    "cut safetensors header": (
        "net.safetensors",
        lambda path: (saved(WEIGHTS, path), path.write_bytes(path.read_bytes()[:4])),
        ("truncated",),
    ),
    "code": ("net.pt", lambda path: saved({"a": _Code()}, path), ("contains code", "state_dict")),
    "code alone": ("net.pkl", lambda path: path.write_bytes(pickle.dumps(_Code(), 4)), ("contains code",)),
    "another shape": (
        "net.pt",
        lambda path: saved({**WEIGHTS, "last.weight": torch.zeros(3, 9)}, path),
        ("'last.weight' is (3, 9) there and (3, 256) here",),
    ),
    "other names": ("net.pt", lambda path: saved({"head": torch.zeros(1)}, path), ("'head' is unknown here",)),
    "not finite": (
        "net.pt",
        lambda path: saved({**WEIGHTS, "last.bias": torch.full((3,), float("nan"))}, path),
        ("'last.bias'", "not finite"),
    ),
    "a list": ("net.pt", lambda path: saved([1], path), ("holds list",)),
    "a folder": ("net.pt", lambda path: path.mkdir(), ("not a file",)),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_used(
    case: str, medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, write, expected = CHECKPOINTS[case]
    monkeypatch.chdir(tmp_path)
    write_nets(tmp_path, monkeypatch)
    write(tmp_path / name)
    models = [{"factory": "nets:Net", "state": f"./{name}"}]
    medpfl("check", write_spec(tmp_path, models=models)).refused(name, *expected)
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_that_fits_is_taken(
    medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nets(tmp_path, monkeypatch)
    torch.save(WEIGHTS, tmp_path / "net.pt")
    models = [{"factory": "nets:Net", "state": "./net.pt"}]
    assert medpfl("check", write_spec(tmp_path, models=models)).code == 0

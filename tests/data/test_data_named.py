"""The papers' data sets, and what is said about folders and files that should be them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medpfl.core.errors import SpecError
from medpfl.data import DATASETS, READERS, check_named

MEDMNIST_2D = {
    "pathmnist", "chestmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist", "breastmnist",
    "bloodmnist", "tissuemnist", "organamnist", "organcmnist", "organsmnist",
}  # fmt: skip


def test_the_papers_sets_and_all_2d_medmnist_sets_are_there() -> None:
    assert set(DATASETS.names()) == {"brain_mri", "covid_cxr", "melanoma"} | MEDMNIST_2D
    for entry in DATASETS:
        named = entry.item
        assert named.name == entry.name
        assert named.reader in READERS
        assert len(set(named.classes)) == len(named.classes) >= 2
        assert all((named.license, named.source, named.citation, named.layout))
        assert named.reader == ("medmnist" if entry.name in MEDMNIST_2D else "folder")
    assert [name for name in DATASETS.names() if DATASETS[name].item.multi_label] == ["chestmnist"]
    with pytest.raises(SpecError, match="did you mean 'brain_mri'"):
        DATASETS["brain_mr"]


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(root / name)
    return root


def test_published_folder_names_are_recognized(tmp_path: Path) -> None:
    make(tmp_path, "Covid/1.png", "Normal/2.png", "Viral Pneumonia/3.png")
    assert check_named("covid_cxr", tmp_path) == ["3 images are there; 251 or 66 or 317 were published."]
    make(tmp_path / "b", "glioma/1.png", "meningioma/2.png", "notumor/3.png", "pituitary/4.png")
    assert check_named("brain_mri", tmp_path / "b") == ["4 images are there; 5712 or 1311 or 7023 were published."]


def test_missing_and_unexpected_folders_are_named(tmp_path: Path) -> None:
    findings = check_named("brain_mri", make(tmp_path, "glioma/1.png", "gliosis/1.png", "pituitary/2.png"))
    assert findings[:3] == [
        "The class folder 'meningioma' of brain_mri is missing.",
        "The class folder 'no_tumor' of brain_mri is missing.",
        "'gliosis' is not a class of brain_mri.",
    ]


def test_a_level_too_high_is_pointed_out(tmp_path: Path) -> None:
    make(tmp_path, "train/benign/1.png", "train/malignant/1.png", "test/benign/2.png")
    (finding,) = check_named("melanoma", tmp_path)
    assert f"Point at '{tmp_path / 'test'}' or '{tmp_path / 'train'}' instead." in finding


def test_nothing_there_says_where_it_is_published(tmp_path: Path) -> None:
    (finding,) = check_named("melanoma", tmp_path)
    assert "is empty" in finding
    assert "Kaggle" in finding
    (finding,) = check_named("pathmnist", tmp_path / "pathmnist.npz")
    assert "does not exist" in finding
    assert "Zenodo" in finding


def write(path: Path, **changes: np.ndarray | None) -> Path:
    content: dict[str, np.ndarray | None] = {}
    for split, count in (("train", 546), ("val", 78), ("test", 156)):
        content[f"{split}_images"] = np.zeros((count, 28, 28), np.uint8)
        content[f"{split}_labels"] = np.zeros((count, 1), np.uint8)
    content.update(changes)
    np.savez_compressed(path, **{key: value for key, value in content.items() if value is not None})  # type: ignore[arg-type]
    return path


def test_a_complete_file_has_no_findings(tmp_path: Path) -> None:
    assert check_named("breastmnist", write(tmp_path / "breastmnist.npz")) == []


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"val_labels": None}, "The array 'val_labels' is missing."),
        ({"val_images": np.zeros((78, 28, 28, 3), np.uint8)}, "val_images has 3 channels; breastmnist has 1."),
        ({"val_labels": np.ones((78, 3), np.uint8)}, "val_labels has 3 entries per image; breastmnist has 1."),
        ({"val_labels": np.full((78, 1), 2, np.uint8)}, "val_labels reach 2; breastmnist has 2 classes."),
        ({"val_images": np.zeros((77, 28, 28), np.uint8)}, "val has 77 images; 78 were published."),
    ],
)
def test_findings_about_files(changes: dict[str, np.ndarray | None], finding: str, tmp_path: Path) -> None:
    assert check_named("breastmnist", write(tmp_path / "x.npz", **changes)) == [finding]


def test_corrupt_files_and_wrong_kinds_are_findings(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 nothing")
    (finding,) = check_named("breastmnist", tmp_path / "x.npz")
    assert "not a readable npz file" in finding
    assert "is a folder" in check_named("breastmnist", tmp_path)[0]
    assert "is a file" in check_named("brain_mri", tmp_path / "x.npz")[0]


def test_other_names_are_not_checked(tmp_path: Path) -> None:
    assert check_named("my-hospital", tmp_path / "nowhere") == []

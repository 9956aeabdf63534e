"""The CSV reader: labels, patients, paths, and what is wrong with a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medpfl.core.errors import DataError
from medpfl.data import CsvReader


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "img").mkdir()
    for number in range(4):
        Image.fromarray(np.full((5, 6), 60 * number, dtype=np.uint8)).save(tmp_path / "img" / f"{number}.png")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_labels_patients_and_relative_paths(images: Path) -> None:
    path = write(images, "path,label,patient\nimg/2.png,b,P1\nimg/0.png,a,P2\nimg/1.png,b,P1\nimg/3.png,a,\n")
    reader = CsvReader(path=path)
    samples = list(reader.read())
    assert reader.class_names() == ("a", "b")
    assert [sample.label for sample in samples] == [1, 0, 1, 0]
    assert [sample.item for sample in samples] == ["img/2.png", "img/0.png", "img/1.png", "img/3.png"]
    assert [round(float(sample.image.mean()) * 255) for sample in samples] == [120, 0, 60, 180]
    patients = [sample.patient for sample in samples]
    assert patients[0] == patients[2] != patients[1]
    assert patients[3] is None
    assert "P1" not in str(patients)


def test_columns_can_be_named(images: Path) -> None:
    path = write(images, "\ufefffile,dx,subject,hospital\nimg/0.png,1,s,h\nimg/1.png,0,t,h\n")
    reader = CsvReader(
        path=path, path_column="file", label_column="dx", patient_column="subject", site_column="hospital"
    )
    samples = list(reader.read())
    assert [sample.label for sample in samples] == [1, 0]
    assert samples[0].patient != samples[1].patient
    assert samples[0].site == samples[1].site is not None


def test_numbers_sort_as_numbers(images: Path) -> None:
    reader = CsvReader(path=write(images, "path,label\nimg/0.png,10\nimg/1.png,9\n"))
    assert reader.class_names() == ("9", "10")


def test_given_classes_fix_order_and_number(images: Path) -> None:
    path = write(images, "path,label\nimg/0.png,a\nimg/1.png,c\n")
    reader = CsvReader(path=path, classes=("c", "b", "a"))
    assert [sample.label for sample in reader.read()] == [2, 0]
    with pytest.raises(DataError, match=r"row 3: unknown label 'c': .*'?a"):
        list(CsvReader(path=path, classes=("a", "b")).read())


def test_joined_labels_are_multi_label(images: Path) -> None:
    path = write(images, "path,label\nimg/0.png,mass|edema\nimg/1.png,No Finding\nimg/2.png,mass\n")
    reader = CsvReader(path=path, separator="|", negative="No Finding")
    assert reader.multi_label
    assert reader.class_names() == ("edema", "mass")
    assert [sample.label for sample in reader.read()] == [(1, 1), (0, 0), (0, 1)]


def test_label_columns_are_multi_label(images: Path) -> None:
    path = write(images, "path,edema,mass\nimg/0.png,1,0\nimg/1.png,,1.0\nimg/2.png,true,0.0\n")
    reader = CsvReader(path=path, label_column=("edema", "mass"))
    assert [sample.label for sample in reader.read()] == [(1, 0), (0, 1), (1, 0)]
    with pytest.raises(DataError, match="'mass' holds '-1'"):
        list(CsvReader(path=write(images, "path,mass\nimg/0.png,-1\n"), label_column=("mass",)).read())


def test_without_labels(images: Path) -> None:
    reader = CsvReader(path=write(images, "path\nimg/0.png\n"), label_column=None)
    assert reader.class_names() == ("unlabeled",)
    assert [sample.label for sample in reader.read()] == [0]


def test_paths_that_lead_outside_do_not_become_items(images: Path) -> None:
    inner = images / "inner"
    inner.mkdir()
    path = write(inner, f"path,label\n../img/0.png,a\n{images / 'img' / '1.png'},b\n")
    assert [sample.item for sample in CsvReader(path=path).read()] == ["row-2/0.png", "row-3/1.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("path,label\n", "no rows"),
        ("path,lable\nimg/0.png,a\n", "no column 'label': did you mean 'lable'"),
        ("path,label\nimg/9.png,a\n", r"row 2: there is no file .*9\.png"),
        ("path,label\n,a\n", "row 2: column 'path' is empty"),
        ("path,label\nimg/0.png,\nimg/1.png,a\n", "row 2: column 'label' is empty"),
        ("path,label\nimg/0.png,a,b\n", "row 2: more fields than columns"),
        ("path;label\nimg/0.png;a\n", "one column only, 'path;label'; separate its columns by commas"),
        ("path\tlabel\nimg/0.png\ta\n", "separate its columns by commas"),
        ("path,label,label\nimg/0.png,a,b\n", "the column 'label' more than once"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str, images: Path) -> None:
    with pytest.raises(DataError, match=message):
        list(CsvReader(path=write(images, text)).read())


def test_a_named_patient_column_must_exist(images: Path) -> None:
    path = write(images, "path,label,person\nimg/0.png,a,x\n")
    with pytest.raises(DataError, match="no column 'persons': did you mean 'person'"):
        list(CsvReader(path=path, patient_column="persons").read())


def test_binary_files_are_no_tables(images: Path) -> None:
    path = images / "table.csv"
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(DataError, match="no text in UTF-8; save it with that encoding"):
        list(CsvReader(path=path).read())


def test_a_folder_is_no_table(images: Path) -> None:
    with pytest.raises(DataError, match="is a folder; give the path of one CSV file"):
        list(CsvReader(path=images).read())

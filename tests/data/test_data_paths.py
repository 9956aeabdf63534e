"""Where a path in a spec leads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from medpfl.core.errors import DataError
from medpfl.data import resolve_path
from medpfl.data.paths import require_access


def test_relative_paths_start_at_the_spec(tmp_path: Path) -> None:
    (tmp_path / "data" / "x").mkdir(parents=True)
    (tmp_path / "specs").mkdir()
    assert resolve_path("../data/x", tmp_path / "specs") == tmp_path / "data" / "x"
    assert resolve_path(str(tmp_path / "data"), Path("/elsewhere")) == tmp_path / "data"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "scans").mkdir()
    assert resolve_path("~/scans", Path("/elsewhere")) == tmp_path / "scans"
    with pytest.raises(DataError, match="no such home folder"):
        resolve_path("~nobody-of-that-name/scans", tmp_path)


def test_files_of_packages_are_found_without_importing_them() -> None:
    code = (
        "import sys; from pathlib import Path; from medpfl.data.paths import resolve_path;"
        "path = resolve_path('package:nibabel/tests/data/anatomical.nii', Path('.'));"
        "assert path.is_file();"
        "assert 'nibabel.tests' not in sys.modules;"
        "assert resolve_path('package:skimage/data', Path('.')).is_dir();"
        "assert 'skimage' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("package:no_such_package_at_all/x", "no package 'no_such_package_at_all'.*pip install"),
        ("package:nibabel/tests/data/anatomica.nii", "did you mean .*anatomical.nii"),
        ("package:nibabel/../secret", "expected package:NAME"),
        ("package:", "expected package:NAME"),
        ("package:sys/x", "no package 'sys'"),
    ],
)
def test_wrong_package_paths(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        resolve_path(text, Path())


def test_missing_paths_suggest_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "Brain_MRI" / "glioma").mkdir(parents=True)
    with pytest.raises(DataError, match=r"path 'brain_mri' does not exist: did you mean '.*/Brain_MRI'\?"):
        resolve_path("brain_mri", tmp_path)
    with pytest.raises(DataError, match=r"did you mean '.*/Brain_MRI/glioma'\?"):
        resolve_path("Brain_MRI/gliomas", tmp_path)
    with pytest.raises(DataError, match=r"did you mean '.*/Brain_MRI'\?"):
        resolve_path("brain_mri/glioma/1.png", tmp_path)
    with pytest.raises(DataError, match="has no 'quite-different'"):
        resolve_path("quite-different", tmp_path)


@pytest.mark.parametrize("text", ["x" * 5000, "nul\0byte"])
def test_impossible_names_are_only_missing(text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        resolve_path(text, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "closed"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(DataError, match="no permission"):
        require_access(path)

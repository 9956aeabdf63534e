"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def shared_data_folder() -> Path | None:
    """The folder with real image sets: MEDPFL_DATA, or ../shared/data beside the project."""
    given = os.environ.get("MEDPFL_DATA")
    folder = Path(given) if given else Path(__file__).parents[2] / "shared" / "data"
    return folder if (folder / "brain_mri").is_dir() else None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real medical images; skips where they are not there."""
    folder = shared_data_folder()
    if folder is None:
        pytest.skip("set MEDPFL_DATA to the folder with brain_mri, covid_cxr, melanoma and medmnist")
    return folder


@pytest.fixture(autouse=True)
def _alike_whatever_ran_before() -> None:
    """Tests run side by side, so each takes one core; modules that a test builds have the same weights every time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)

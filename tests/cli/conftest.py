"""The command line in this process, as `medpfl ...` runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from medpfl.cli import main


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def refused(self, *expected: object) -> str:
        """The message, after checking that it is one line that says all of `expected`, and that the exit code is 2."""
        assert self.code == 2, self
        assert "Traceback" not in self.err
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        for text in expected:
            assert str(text) in line
        return line


Command = Callable[..., Ended]


@pytest.fixture
def medpfl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `medpfl` with these arguments."""

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["medpfl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return run


FILMS = {"name": "films", "reader": "phantom", "kind": "chest", "count": 30, "size": 16, "victims": 2}


@pytest.fixture(scope="session")
def write_spec() -> Callable[..., Path]:
    """Writes `audit.yaml` into a folder: two phantom films, one attack, and what the caller gives instead."""

    def write(folder: Path, **changes: Any) -> Path:
        plain = {"data": [FILMS], "models": ["lenet_dlg"], "attacks": [{"name": "cpl", "iterations": 1}], **changes}
        path = folder / "audit.yaml"
        path.write_text(yaml.safe_dump(plain))
        return path

    return write

"""Output folders that cannot be used, full disks, other commands: one line, exit code 2, and nothing is lost."""

from __future__ import annotations

import builtins
import csv
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medpfl.audit import load_spec, run_audit
from medpfl.core import files
from medpfl.report import write_report

Medpfl = Callable[..., Any]
WriteSpec = Callable[..., Path]


def audit(medpfl: Medpfl, spec: Path, out: Path) -> Any:
    return medpfl("audit", spec, "--out", out, "--workers", 0)


def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as handle:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(handle)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ot", "x"], "--ot"),
        ([], "'--out'"),
        (["--out", "x", "--workers", "two"], "--workers"),
        (["--out", "x", "--workers", "-1"], "--workers"),
        (["--out", "x", "--fail-if", "asr >"], "--fail-if: expected a comparison such as 'asr <= 0.05', found 'asr >'"),
        (["--out", "x", "--fail-if", "arsr > 1"], "did you mean 'asr'"),
    ],
)
def test_wrong_options(
    arguments: list[str],
    expected: str,
    medpfl: Medpfl,
    write_spec: WriteSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    medpfl("audit", write_spec(tmp_path), *arguments).refused(expected)
    assert not (tmp_path / "x").exists()


def test_an_output_folder_that_cannot_be_one(
    medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, taken = write_spec(tmp_path), tmp_path / "thesis.txt"
    taken.write_text("mine")
    audit(medpfl, spec, taken).refused(taken, "--out")
    audit(medpfl, spec, taken / "out").refused(taken / "out", "Not a directory", "--out")
    audit(medpfl, spec, tmp_path).refused(tmp_path, "not empty", "--out")
    assert taken.read_text() == "mine"

    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", forbidden)
        audit(medpfl, spec, tmp_path / "out").refused(tmp_path / "out", "no permission", "--out")
    assert audit(medpfl, spec, tmp_path / "out").code == 0


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100:] = b"\x55" * (len(content) - 100)
    path.write_bytes(content)


def meta(path: Path, key: str, value: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = ?", (value, key))
    connection.close()


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda path: path.write_bytes(b"hello" * 999), "damaged"),
        (damage, "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:6000]), "damaged"),
        (lambda path: path.write_bytes(b""), "without a usable audit.sqlite"),
        (lambda path: meta(path, "plan", "{"), "damaged"),
        (lambda path: meta(path, "schema", "99"), "schema 99"),
        (lambda path: meta(path, "plan", '{"threads": 4}'), "another plan"),
    ],
)
def test_a_store_that_cannot_be_used_is_left_as_it_is(
    spoil: Callable[[Path], object], expected: str, medpfl: Medpfl, finished: Path
) -> None:
    path = finished / "out" / "audit.sqlite"
    spoil(path)
    spoiled, table = path.read_bytes(), (finished / "out" / "results.csv").read_bytes()
    audit(medpfl, finished / "audit.yaml", finished / "out").refused(finished / "out", expected, "--out")
    assert path.read_bytes() == spoiled
    assert (finished / "out" / "results.csv").read_bytes() == table


def test_the_store_of_something_else_is_left_alone(medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    connection = sqlite3.connect(tmp_path / "out" / "audit.sqlite")
    connection.execute("CREATE TABLE recipes (dish TEXT)")
    connection.commit()
    audit(medpfl, write_spec(tmp_path), tmp_path / "out").refused("audit.sqlite", "something else", "--out")
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("recipes",)]
    connection.close()


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, write_spec: WriteSpec) -> Path:
    """A folder with a spec and its finished audit."""
    folder = tmp_path_factory.mktemp("once")
    run_audit(load_spec(write_spec(folder)), folder / "out", workers=0)
    write_report(folder / "out")
    return folder


@pytest.fixture
def finished(once: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be spoiled."""
    return Path(shutil.copytree(once, tmp_path / "finished"))


@pytest.mark.parametrize("room", ["images", "store", "tables"])
def test_a_full_disk_loses_nothing(
    room: str, medpfl: Medpfl, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, out = finished / "audit.yaml", tmp_path / "full"
    with monkeypatch.context() as patched:
        if room == "store":  # SQLite itself runs out of pages
            connect = sqlite3.connect
            pages = (finished / "out" / "audit.sqlite").stat().st_size // 4096 - 1

            def small(*arguments: Any, **options: Any) -> sqlite3.Connection:
                connection: sqlite3.Connection = connect(*arguments, **options)
                connection.execute(f"PRAGMA max_page_count = {pages}")
                return connection

            patched.setattr(sqlite3, "connect", small)
            expected = ("audit.sqlite", "full")
        else:
            opened = []

            def limited(path: Path, *arguments: Any, **options: Any) -> Any:
                opened.append(path)
                if (room == "images" and len(opened) > 4) or (room == "tables" and "results.csv" in str(path)):
                    raise OSError(28, "No space left on device", str(path))
                return builtins.open(path, *arguments, **options)  # noqa: PTH123 - it stands in for `open`

            patched.setattr(files, "open", limited, raising=False)
            expected = ("images/" if room == "images" else "results.csv", "No space left on device")
        ended = audit(medpfl, spec, out)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    *lines, message = ended.err.splitlines()
    assert all(line.startswith("auditing: ") for line in lines)
    for text in (*expected, "nothing that was finished is lost", "run the same command again"):
        assert text in message
    assert audit(medpfl, spec, out).code == 0
    assert results(out) == results(finished / "out")


# the other commands


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["adit"], "did you mean 'audit'"),
        (["report", "{}/nowhere"], "medpfl audit"),
        (["show", "{}/nowhere", "v0"], "no such folder"),
        (["show", "{}/out", "v99"], "v99"),
        (["show", "{}/out"], "CASE"),
        (["compare", "{}/out", "{}/nowhere"], "no such folder"),
        (["export", "{}/nowhere"], "no such folder"),
        (["export", "{}/out", "--to", "{}/out/x"], "--to"),
        (["export", "{}/out", "--to", "{}/audit.yaml/x"], "--to"),
        (["list", "atacks"], "did you mean 'attacks'"),
        (["describe", "attacks", "dgl"], "did you mean 'dlg'"),
        (["init", "--reader", "fantom"], "did you mean 'phantom'"),
        (["init", "--reader", "phantom", "--model", "lenet_dgl"], "did you mean 'lenet_dlg'"),
        (["init", "--reader", "phantom", "--model", "lenet_dlg", "--out", "{}/audit.yaml"], "not overwritten"),
        (["init", "--reader", "phantom", "--model", "lenet_dlg", "--out", "{}/audit.yaml/x"], "cannot be written"),
        (["init", "--data", "{}/nowhere"], "does not exist"),
    ],
)
def test_the_other_commands(
    arguments: list[str], expected: str, medpfl: Medpfl, once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(once.rglob("*"))
    line = medpfl(*(argument.format(once) for argument in arguments)).refused()
    assert expected.lower() in line.lower()
    assert sorted(once.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["results.csv", "summary.json"])
@pytest.mark.parametrize("command", [["report"], ["compare"], ["export"]])
def test_a_spoiled_table(name: str, command: list[str], medpfl: Medpfl, once: Path, finished: Path) -> None:
    path = finished / "out" / name
    path.write_bytes(b"\xff{")
    others = [str(once / "out")] if command == ["compare"] else []
    medpfl(*command, finished / "out", *others).refused(path, "run the audit again")

"""Audits at the command line: exit codes, stopping and going on, workers that die, progress, help."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import psutil
import pytest
import torch
from jinja2 import TemplateError
from PIL import Image
from rich.console import Console
from typer.main import get_command
from typer.models import ArgumentInfo

from medpfl.audit.execute import compute
from medpfl.cli.app import app
from medpfl.cli.progress import Bar, Lines, progress

Medpfl = Callable[..., Any]
WriteSpec = Callable[..., Path]
DEFENSES = ["none", {"name": "gaussian", "std": 0.1}]

NETS = """
import multiprocessing, os, pathlib, signal
import torch
from torch import nn
from torch._C import _functorch

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.last = nn.Linear(256, classes)
    def forward(self, images):
        if multiprocessing.parent_process() is not None:
            self.happens(images)
        return self.last(images.flatten(1))
    def happens(self, images):
        pass

class KilledOnce(Net):
    def happens(self, images):
        marker = pathlib.Path(__file__).with_name("killed")
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

class LeavesAtOneVictim(Net):
    def happens(self, images):
        while _functorch.is_functorch_wrapped_tensor(images):
            images = _functorch.get_unwrapped(images)
        means = images.detach().double().reshape(-1, 256).mean(1)
        if bool(((means - float(pathlib.Path(__file__).with_name("victim").read_text())).abs() < 1e-7).any()):
            os._exit(5)
"""


def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as handle:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(handle)]


@pytest.mark.parametrize(
    ("stop", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGINT), (os.kill, signal.SIGTERM)]
)
def test_a_stopped_audit_ends_its_workers_and_goes_on(
    stop: Callable[[int, int], None], number: int, medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path
) -> None:
    spec, out = write_spec(tmp_path, attacks=[{"name": "cpl", "iterations": 20}], defenses=DEFENSES), tmp_path / "out"
    command = [sys.executable, "-m", "medpfl", "audit", str(spec), "--out", str(out), "--workers", "2"]
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heeding,
    ) as process:
        workers = wait_for_workers(process.pid)
        stop(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == f"stopped; run the same command again to go on with what is in {out}"
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive
    assert medpfl("audit", spec, "--out", out, "--workers", 0).code == 0
    assert [row["status"] for row in results(out)] == ["done"] * 4


def wait_for_workers(pid: int) -> list[psutil.Process]:
    """All children, as soon as both workers are there; they need seconds to come up."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        children: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        if len(workers) == 2:
            return children
        time.sleep(0.05)
    raise AssertionError("no workers were started")


def test_interrupted_in_the_middle_the_same_command_finishes(
    medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write_spec(tmp_path, defenses=DEFENSES)
    assert medpfl("audit", spec, "--out", tmp_path / "whole", "--workers", 0).code == 0
    calls: list[object] = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("medpfl.audit.workers.compute", interrupted)
        ended = medpfl("audit", spec, "--out", tmp_path / "out", "--workers", 0)
    assert ended.code == 130
    assert ended.err.splitlines()[-1].startswith("stopped; run the same command again")
    assert len(results(tmp_path / "out")) == 2
    assert medpfl("audit", spec, "--out", tmp_path / "out", "--workers", 0).code == 0
    assert results(tmp_path / "out") == results(tmp_path / "whole")


def test_a_worker_that_is_killed_once_costs_nothing(medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path) -> None:
    (tmp_path / "nets_once.py").write_text(NETS)
    spec, out = write_spec(tmp_path, models=[{"factory": "nets_once:KilledOnce"}]), tmp_path / "out"
    assert medpfl("audit", spec, "--out", out, "--workers", 1).code == 0
    assert (tmp_path / "killed").exists()
    assert [row["status"] for row in results(out)] == ["done", "done"]


def test_a_case_that_kills_its_process_fails_alone(medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path) -> None:
    (tmp_path / "nets_twice.py").write_text(NETS)
    spec, out = write_spec(tmp_path, models=[{"factory": "nets_twice:LeavesAtOneVictim"}]), tmp_path / "out"
    known = tmp_path / "known"
    assert medpfl("audit", write_spec(tmp_path), "--out", known, "--workers", 0).code == 0  # the same victims
    with np.load((known / results(known)[1]["truth_image"]).with_suffix(".npz")) as saved:
        (tmp_path / "victim").write_text(repr(float(saved["image"].astype(np.float64).mean())))
    write_spec(tmp_path, models=[{"factory": "nets_twice:LeavesAtOneVictim"}])
    ended = medpfl("audit", spec, "--out", out, "--workers", 1)
    assert ended.code == 3
    assert ended.err.splitlines()[-1].startswith("auditing: 2/2 cases, 1 failed")
    assert [(row["victim"], row["status"], row["reason"]) for row in results(out)] == [
        ("0", "done", ""),
        ("1", "failed", "its process ended twice (exit code 5)"),
    ]
    assert medpfl("audit", spec, "--out", out, "--workers", 1).code == 3


def test_a_finished_audit(
    medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, out = write_spec(tmp_path), tmp_path / "out"
    first = medpfl("audit", spec, "--out", out, "--workers", 0, "--json", "--fail-if", "psnr_mean < 0")
    assert first.code == 0
    assert json.loads(first.out)["counts"]["done"] == 2
    assert [line.partition(",")[0] for line in first.err.splitlines()] == [
        "auditing: 0/2 cases",
        "auditing: 2/2 cases",
    ]
    table = (out / "results.csv").read_bytes()

    def never(*_: object) -> None:
        raise AssertionError("nothing is left to compute")

    with monkeypatch.context() as patched:
        patched.setattr("medpfl.audit.workers.compute", never)
        again = medpfl("audit", spec, "--out", out, "--workers", 0, "--json")
        assert again.code == 0
        assert json.loads(again.out) == json.loads(first.out)
        holds = medpfl("audit", spec, "--out", out, "--workers", 0, "--fail-if", "psnr_mean > 0")
    assert (out / "results.csv").read_bytes() == table
    assert holds.code == 4
    assert holds.err.splitlines()[-1] == "--fail-if holds: psnr_mean > 0"
    more = medpfl("audit", write_spec(tmp_path, defenses=DEFENSES), "--out", out, "--workers", 0)
    assert more.code == 0
    assert len(results(out)) == 4
    medpfl("audit", write_spec(tmp_path), "--out", out).refused(out, "belongs to another spec", "--out")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), TemplateError("a bug")], ids=repr)
def test_a_report_that_fails_costs_no_results(
    error: Exception,
    medpfl: Medpfl,
    write_spec: WriteSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec, out = write_spec(tmp_path), tmp_path / "out"

    def fails(*_: Any, **__: Any) -> str:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("medpfl.report.rendering.render", fails)
        if isinstance(error, OSError):
            ended = medpfl("audit", spec, "--out", out, "--workers", 0)
            said, last = ended.err.splitlines()[-2:]
            assert ended.code == 2
            assert "No space left" in last
        else:
            with pytest.raises(TemplateError, match="a bug"):  # Python shows the traceback and exits 1
                medpfl("audit", spec, "--out", out, "--workers", 0)
            said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"All results are safe in {out}, only the report is missing; `medpfl report {out}` writes it"
    assert len(results(out)) == 2
    assert not (out / "report.html").exists()
    assert medpfl("report", out).code == 0
    assert (out / "report.html").exists()


def test_progress_in_a_log_is_a_line_a_minute() -> None:
    seconds, written = [0.0], list[str]()
    lines = Lines(written.append, clock=lambda: seconds[0])
    for moment, done, failed in ((0, 4, 0), (30, 5, 0), (59, 6, 0), (61, 7, 1), (100, 8, 1), (130, 10, 1)):
        seconds[0] = moment
        lines.update(done, 10, failed)
    lines.close()
    assert written == [
        "auditing: 4/10 cases, 0 s",
        "auditing: 7/10 cases, 1 failed, 61 s, about 61 s left",
        "auditing: 10/10 cases, 1 failed, 2 min",
    ]


OURS = """
from torch import nn

class Ours(nn.Sequential):
    def __init__(self, channels, size, classes):
        super().__init__(nn.Flatten(), nn.Linear(channels * size * size, classes))
"""


def test_the_spec_in_the_output_folder_runs_from_anywhere(
    medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, elsewhere = tmp_path / "study", tmp_path / "elsewhere"
    scans = study / "scans"
    for folder in (study / "weights", scans / "a", scans / "b", elsewhere):
        folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for index in range(16):
        pixels = draw.integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(scans / "ab"[index % 2] / f"{index}.png")
    (study / "ours_alone.py").write_text(OURS)
    torch.save({"1.weight": torch.full((2, 256), 0.01), "1.bias": torch.zeros(2)}, study / "weights/net.pt")
    spec = write_spec(
        study,
        data=[{"name": "scans", "reader": "folder", "path": "scans", "size": 16, "victims": 2}],
        models=[{"factory": "ours_alone:Ours", "state": "./weights/net.pt"}],
    )
    assert medpfl("audit", spec, "--out", study / "out", "--workers", 0).code == 0
    monkeypatch.chdir(elsewhere)
    for source, out in ((study / "out", elsewhere / "first"), (elsewhere / "first", elsewhere / "second")):
        monkeypatch.delitem(sys.modules, "ours_alone", raising=False)
        assert medpfl("audit", source / "spec.yaml", "--out", out, "--workers", 1).code == 0
        assert results(out) == results(study / "out")
    assert str(tmp_path) not in (study / "out/spec.yaml").read_text()
    assert medpfl("export", elsewhere / "first", "--without-images", "--to", tmp_path / "copy").code == 0
    for path in (tmp_path / "copy").iterdir():
        assert "study" not in path.read_text(), path
        assert "weights/" not in path.read_text(), path
    assert "from the checkpoint net.pt" in (tmp_path / "copy/report.html").read_text()
    monkeypatch.delitem(sys.modules, "ours_alone", raising=False)
    (study / "ours_alone.py").rename(tmp_path / "moved.py")
    gone = medpfl("audit", elsewhere / "first/spec.yaml", "--out", elsewhere / "third")
    gone.refused("found no module 'ours_alone'", elsewhere / "first")


def test_nobody_else_can_read_what_an_audit_leaves(medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = os.umask(0o022)
    try:
        spec = write_spec(tmp_path, models=[{"name": "lenet_dlg", "state": {"trained": {"steps": 1}}}])
        assert medpfl("audit", spec, "--out", out, "--workers", 0).code == 0
        (out / "audit.sqlite").chmod(0o644)
        (out / ".lock").chmod(0o644)
        assert medpfl("audit", spec, "--out", out, "--workers", 0).code == 0
        assert medpfl("export", out, "--to", tmp_path / "copy").code == 0
    finally:
        os.umask(before)
    for folder in (out, tmp_path / "copy"):
        found = [folder, *folder.rglob("*")]
        assert {path.suffix for path in found} >= {".csv", ".png", ".npz", ".html"}
        for path in found:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_training_is_shown_too() -> None:
    seconds, written = [0.0], list[str]()
    lines = Lines(written.append, clock=lambda: seconds[0])
    lines.update(0, 4, 0)
    for moment, fraction in ((1, 0.1), (61, 0.25), (62, 0.3), (140, 1.0)):
        seconds[0] = moment
        lines.training("films/lenet_dlg/s0", fraction)
    assert written == ["auditing: 0/4 cases, 0 s", "training films/lenet_dlg/s0: 25%"]
    screen = io.StringIO()
    with progress(Console(file=screen, force_terminal=True, width=160)) as display:
        display.update(0, 4, 0)
        display.training("films/lenet_dlg/s0", 0.25)
        display.update(0, 4, 0)
    assert "training films/lenet_dlg/s0 25%" in screen.getvalue()


def test_progress_in_a_terminal_is_a_bar_from_the_first_update_on() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with progress(console) as display:
        assert isinstance(display, Bar)
    assert screen.getvalue() == ""
    with progress(console) as display:
        display.update(3, 4, 1)
    assert "3/4 cases, 1 failed" in screen.getvalue()
    assert "75%" in screen.getvalue()


@pytest.mark.parametrize("name", sorted(get_command(app).commands))  # type: ignore[attr-defined]
def test_help_says_what_arguments_mean_and_gives_an_example(
    name: str, medpfl: Medpfl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = medpfl(name, "--help")
    assert shown.code == 0
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "\\" not in shown.out
    text = " ".join(shown.out.split())
    assert f"medpfl {name}" in text.partition("Example")[2]
    callback = get_command(app).commands[name].callback  # type: ignore[attr-defined]
    hints = get_type_hints(callback, include_extras=True).values()
    declared = [part.help for hint in hints for part in getattr(hint, "__metadata__", ()) if hasattr(part, "help")]
    assert declared
    for explanation in declared:
        assert explanation
        assert " ".join(explanation.split()) in text


def test_every_positional_argument_has_a_text() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        hints = get_type_hints(command.callback, include_extras=True)
        declared = [part for hint in hints.values() for part in getattr(hint, "__metadata__", ())]
        arguments = [part for part in declared if isinstance(part, ArgumentInfo)]
        expected = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        assert len(arguments) == len(expected), name


def test_without_a_command_the_help_is_shown(medpfl: Medpfl) -> None:
    shown = medpfl()
    assert shown.code == 0
    for name in get_command(app).commands:  # type: ignore[attr-defined]
        assert f"\n  {name} " in shown.out

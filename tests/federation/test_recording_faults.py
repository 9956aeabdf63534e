"""What goes wrong in real federations: a clear message, training goes on, and nothing that was recorded is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import medpfl
from medpfl.core.errors import DataError, StoreError
from medpfl.federation.recording import FolderStorage, Recorder, read_recording

BEFORE = {"w": torch.zeros(3), "steps": torch.tensor(0)}
AFTER = {"w": torch.ones(3), "steps": torch.tensor(5)}


def recorded(folder: Path, **values: Any) -> bool:
    return bool(medpfl.record(folder, **{"sent": BEFORE, "received": AFTER, "examples": 4, **values}))


def test_the_example_of_the_docs_records_what_its_loop_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "recording.md").read_text(encoding="utf-8")
    code = text.partition("wherever the update is at hand:\n\n")[2].partition("\n\nIt never stops")[0]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, images, labels = nn.Linear(4, 2), torch.rand(6, 4), torch.arange(6) % 2
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=6)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = torch.autograd.grad(nn.functional.cross_entropy(model(images), labels), [model.weight])[0]
    exec(textwrap.dedent(code), {"model": model, "loader": loader, "number": 3})
    (update,) = read_recording(tmp_path / "recording").updates
    assert (update.round, update.client, update.examples) == (3, "a", 6)
    assert torch.allclose(update.tensors["weight"], start["weight"] - 0.1 * expected, atol=1e-6)


@pytest.mark.parametrize(
    ("received", "says"),
    [
        ({}, "holds no tensor"),
        ([torch.ones(3)], "found list"),
        (None, "holds no tensor"),
        ({"w": object()}, "no tensor in memory can hold"),
        ({"w": torch.ones(3, device="meta")}, "no tensor in memory can hold"),
    ],
)
def test_an_odd_update_is_a_warning_and_the_next_one_is_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, received: Any, says: str
) -> None:
    assert not recorded(tmp_path / "r", received=received, client="odd")
    assert says in caplog.text
    assert "training goes on" in caplog.text
    assert recorded(tmp_path / "r", client="good")
    found = read_recording(tmp_path / "r")
    assert [update.client for update in found.updates] == ["good"]
    assert any("client odd" in problem and says in problem for problem in found.problems)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool, torch.complex64])
def test_every_type_and_unknown_names_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    assert recorded(tmp_path / "r", received={"nobody.knows.this": torch.ones(3, 2).to(dtype)})
    (update,) = read_recording(tmp_path / "r").updates
    assert torch.equal(update.tensors["nobody.knows.this"], torch.ones(3, 2).to(dtype))


def test_shared_transposed_and_sparse_tensors_and_numbers_of_numpy(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    received = {"a": base, "b": base, "c": base.T, "d": base.to_sparse()}
    assert recorded(tmp_path / "r", received=received, examples=np.int64(7))
    (update,) = read_recording(tmp_path / "r").updates
    assert torch.equal(update.tensors["c"], base.T)
    assert torch.equal(update.tensors["d"], base)
    assert update.examples == 7


def test_settings_that_json_does_not_know_do_not_lose_an_update(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r") as recorder:
        recorder.received(1, "a", AFTER, config={"loss": np.float32(0.5), "accuracy": torch.tensor(1.0), "x": object()})
    (update,) = read_recording(tmp_path / "r").updates
    assert (update.config["loss"], update.config["accuracy"]) == (0.5, 1.0)


def test_a_loop_that_raises_in_a_round_leaves_what_came_before(tmp_path: Path) -> None:
    def loop() -> None:
        with Recorder(tmp_path / "r") as recorder:
            recorder.sent(1, BEFORE)
            recorder.received(1, "a", AFTER)
            raise ConnectionError("client b is gone")

    with pytest.raises(ConnectionError):
        loop()
    with Recorder(tmp_path / "r") as recorder:
        recorder.failed(1, "b", "client b is gone")
        recorder.received(2, "a", AFTER)
    found = read_recording(tmp_path / "r")
    assert [(update.round, update.client) for update in found.updates] == [(1, "a"), (2, "a")]
    assert found.problems == ("round 1, client b: client b is gone",)


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("cut", range(1, 12, 2))
def test_a_recording_that_was_cut_off_is_read_and_goes_on(tmp_path: Path, encrypted: bool, cut: int) -> None:
    if encrypted:
        pytest.importorskip("cryptography")
    key = os.urandom(32) if encrypted else None
    with Recorder(FolderStorage(tmp_path / "r", key)) as recorder:
        for client in ("a", "b"):
            recorder.received(1, client, AFTER)
    log = tmp_path / "r" / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-cut])
    found = read_recording(tmp_path / "r", key=key)
    assert [update.client for update in found.updates] == (["a", "b"] if cut == 1 else ["a"])
    with Recorder(FolderStorage(tmp_path / "r", key)) as recorder:
        recorder.received(2, "c", AFTER)
    longer = read_recording(tmp_path / "r", key=key)
    assert {"a", "c"} <= {update.client for update in longer.updates}
    assert len(longer.updates) + len(longer.problems) == 3


def test_another_key_is_still_refused_and_a_damaged_line_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    key = os.urandom(32)
    with Recorder(FolderStorage(tmp_path / "r", key)) as recorder:
        for client in ("a", "b", "c"):
            recorder.received(1, client, AFTER)
    with pytest.raises(DataError, match="cannot be decrypted"):
        read_recording(tmp_path / "r", key=os.urandom(32))
    log = tmp_path / "r" / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    lines[2] = "00" + lines[2][2:] if not lines[2].startswith("00") else "11" + lines[2][2:]
    log.write_text("".join(lines))
    found = read_recording(tmp_path / "r", key=key)
    assert [update.client for update in found.updates] == ["a", "c"]
    assert len(found.problems) == 1


def test_one_line_recordings_of_several_clients_at_once_lose_nothing(tmp_path: Path) -> None:
    threads = [threading.Thread(target=recorded, args=(tmp_path / "r",), kwargs={"client": str(n)}) for n in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    found = read_recording(tmp_path / "r")
    assert sorted(update.client for update in found.updates) == [str(number) for number in range(8)]
    assert not found.problems


def test_a_folder_that_somebody_else_keeps_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medpfl.federation.recording.writer.PATIENCE", 0.1)
    with Recorder(tmp_path / "r") as first:
        assert not recorded(tmp_path / "r")
        assert "another recorder" in caplog.text
        first.received(1, "a", AFTER)
    assert [update.client for update in read_recording(tmp_path / "r").updates] == ["a"]


FULL = """
import resource, signal, sys, torch, medpfl
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
small, large = {"w": torch.ones(10)}, {"w": torch.ones(100000)}
for number, state in enumerate([small, large, small], start=1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50000, resource.RLIM_INFINITY))
    print(number, medpfl.record(sys.argv[1], sent=small, received=state, examples=1, round=number))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX has it")
def test_a_disk_that_takes_no_more_is_a_warning_and_what_fits_is_kept(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "r")], capture_output=True, text=True, timeout=120, check=True
    )
    assert ran.stdout.split("\n")[:3] == ["1 True", "2 False", "3 True"]
    assert "cannot be written" in ran.stderr
    assert [update.round for update in read_recording(tmp_path / "r").updates] == [1, 3]
    assert not list((tmp_path / "r").glob(".0*"))


def test_a_line_of_which_only_a_part_fitted_does_not_take_the_next_one_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medpfl.core.files import append as plain

    def half(path: Path, text: str) -> None:
        plain(path, text[:40])
        raise StoreError("no space left")

    with Recorder(tmp_path / "r") as recorder:
        recorder.received(1, "a", AFTER)
        monkeypatch.setattr("medpfl.federation.recording.storage.append", half)
        with pytest.raises(StoreError, match="no space"):
            recorder.received(2, "a", AFTER)
        monkeypatch.setattr("medpfl.federation.recording.storage.append", plain)
        recorder.received(3, "a", AFTER)
    found = read_recording(tmp_path / "r")
    assert [update.round for update in found.updates] == [1, 3]
    assert len(found.problems) == 1

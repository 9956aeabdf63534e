"""Recordings: what comes back is what went in, and what was lost is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import medpfl
from medpfl.core.errors import DataError, StoreError
from medpfl.federation.recording import About, FolderStorage, MemoryStorage, Recorder, read_recording

STATE = {
    "conv.weight": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
    "bn.num_batches_tracked": torch.tensor(5),
    "half": torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
}


def test_tensors_of_every_type_come_back_as_they_were(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r", About(source="test")) as recorder:
        recorder.sent(1, STATE, config={"lr": 0.1})
        recorder.received(1, "b", {"x": np.arange(4, dtype=np.int32)}, examples=7, kind="delta")
        recorder.received(1, "a", STATE, examples=3)
    recording = read_recording(tmp_path / "r")
    assert (recording.about.source, recording.rounds, recording.problems) == ("test", (1,), ())
    first, second = recording.updates
    assert [(one.client, one.examples, one.kind) for one in (first, second)] == [("a", 3, "weights"), ("b", 7, "delta")]
    for name, tensor in STATE.items():
        assert first.tensors[name].dtype == tensor.dtype
        assert torch.equal(first.tensors[name], tensor)
    assert second.tensors["x"].tolist() == [0, 1, 2, 3]
    sent = recording.sent_to(first)
    assert sent is not None
    assert sent.config == {"lr": 0.1}
    assert torch.equal(sent.tensors["conv.weight"], STATE["conv.weight"])


def test_a_client_with_a_model_of_its_own_is_told_apart(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r") as recorder:
        recorder.sent(1, {"w": torch.zeros(1)})
        recorder.sent(1, {"w": torch.ones(1)}, client="7")
        for client in ("7", "8"):
            recorder.received(1, client, {"w": torch.ones(1)})
    recording = read_recording(tmp_path / "r")
    sent = {update.client: recording.sent_to(update) for update in recording.updates}
    assert {client: float(one.tensors["w"]) for client, one in sent.items() if one is not None} == {"7": 1.0, "8": 0.0}


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r") as recorder:
        recorder.sent(1, STATE)
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "r").iterdir())


def test_a_log_that_was_cut_off_loses_its_last_line_only_and_goes_on(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r") as recorder:
        recorder.sent(1, STATE)
        recorder.received(1, "a", STATE)
        recorder.received(1, "b", STATE)
    log = tmp_path / "r" / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-30])
    cut = read_recording(tmp_path / "r")
    assert [update.client for update in cut.updates] == ["a"]
    assert len(cut.problems) == 1
    assert "cut off" in cut.problems[0]
    with Recorder(tmp_path / "r") as recorder:
        recorder.received(2, "a", STATE)
    longer = read_recording(tmp_path / "r")
    assert [(update.round, update.client) for update in longer.updates] == [(1, "a"), (2, "a")]
    assert len(longer.problems) == 1


def test_a_recorder_killed_at_any_moment_leaves_whole_updates(tmp_path: Path) -> None:
    script = (
        "import sys, torch\nfrom medpfl.federation.recording import Recorder\n"
        "recorder = Recorder(sys.argv[1])\nnumber = 0\n"
        "while True:\n number += 1\n recorder.received(number, 'a', {'w': torch.full((50000,), float(number))})\n"
        " print(number, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "r")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [int(process.stdout.readline()) for _ in range(5)][-1]
    process.kill()
    process.wait(timeout=60)
    recording = read_recording(tmp_path / "r")
    assert len(recording.updates) >= said
    assert all(float(update.tensors["w"][0]) == update.round for update in recording.updates)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r") as recorder:
        recorder.received(1, "a", {"w": torch.zeros(3)})
        recorder.received(1, "b", {"w": torch.ones(3)})
    first, second = read_recording(tmp_path / "r").updates
    path = tmp_path / "r" / first.file
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (tmp_path / "r" / second.file).unlink()
    found = read_recording(tmp_path / "r")
    with pytest.raises(DataError, match="is not what was recorded"):
        _ = found.updates[0].tensors
    assert [problem for problem in found.problems if "is missing" in problem]


def test_two_recorders_cannot_write_to_one_folder(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r"), pytest.raises(StoreError, match="another recorder"):
        Recorder(tmp_path / "r")
    Recorder(tmp_path / "r").close()


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"thesis\.txt"):
        Recorder(tmp_path)
    with pytest.raises(DataError, match="no recording"):
        read_recording(tmp_path)


def test_at_its_limit_recording_stops_and_says_so(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r", limit=3000) as recorder:
        for number in range(1, 6):
            recorder.received(number, "a", {"w": torch.full((300,), float(number))})
        assert "limit" in recorder.stopped
    recording = read_recording(tmp_path / "r")
    assert 1 <= len(recording.updates) < 3
    assert any("limit" in problem for problem in recording.problems)


def test_the_model_sent_to_all_lies_on_the_disk_once(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r") as recorder:
        for client in ("a", "b", "c"):
            recorder.sent(1, STATE, client=client)
    assert len(list((tmp_path / "r").glob("*.safetensors"))) == 1


def test_what_no_tensor_can_hold_and_empty_updates_are_failures_of_the_client(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r") as recorder:
        recorder.received(1, "a", {"w": np.array([object()])})
        recorder.received(1, "b", {})
        recorder.received(1, "c", {"w": torch.ones(1)})
    recording = read_recording(tmp_path / "r")
    assert [update.client for update in recording.updates] == ["c"]
    assert len(recording.problems) == 2
    assert all(word in " ".join(recording.problems) for word in ("client a", "client b", "holds no tensor"))


def test_nothing_touches_the_disk_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Recorder(storage := MemoryStorage()) as recorder:
        recorder.received(1, "a", STATE)
    assert torch.equal(read_recording(storage).updates[0].tensors["conv.weight"], STATE["conv.weight"])
    assert not list(tmp_path.iterdir())


def test_an_encrypted_recording_shows_nothing_without_its_key(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    key = os.urandom(32)
    with Recorder(FolderStorage(tmp_path / "r", key), About(notes="secret clinic")) as recorder:
        recorder.sent(1, STATE)
        recorder.received(1, "a", STATE)
    content = b"".join(path.read_bytes() for path in (tmp_path / "r").iterdir())
    assert b"conv.weight" not in content
    assert b"secret clinic" not in content
    recording = read_recording(tmp_path / "r", key=key)
    assert torch.equal(recording.updates[0].tensors["conv.weight"], STATE["conv.weight"])
    assert recording.about.notes == "secret clinic"
    with pytest.raises(DataError, match="encrypted"):
        read_recording(tmp_path / "r")
    with pytest.raises(DataError, match="cannot be decrypted"):
        read_recording(tmp_path / "r", key=os.urandom(32))


def test_one_line_records_a_round_of_a_loop_of_ones_own(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.nn.init.zeros_(model.weight)
    medpfl.record(tmp_path / "r", sent=before, received=model.state_dict(), examples=4)
    (update,) = read_recording(tmp_path / "r").updates
    assert (update.examples, float(update.tensors["weight"].abs().sum())) == (4, 0.0)

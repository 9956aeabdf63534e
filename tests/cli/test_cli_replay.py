"""`medpfl replay`: recorded updates are attacked; scores exist only where the truth was given."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medpfl.cli.app import app
from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.errors import InputError
from medpfl.core.tasks import SingleLabel
from medpfl.federation.client import client_step
from medpfl.federation.recording import About, Recorder
from medpfl.models import build_model

LIGHT = ("--attack", "{name: gradinv, iterations: 3}", "--attack", "first_layer_readout")
RECIPE = ("--recipe", "{learning_rate: 0.1}", "--size", "12")


def model() -> GlobalModel:
    return build_model(
        "lenet_dlg", image_shape=(1, 12, 12), task=SingleLabel(2), generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two rounds of two clients with one image each, and their truth."""
    monkeypatch.chdir(tmp_path)
    images = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    net = model()
    (tmp_path / "truth").mkdir()
    with Recorder(tmp_path / "recording", About(source="a test")) as recorder:
        for number in (1, 2):
            recorder.sent(number, net.parameters)
            for client in (0, 1):
                batch = Batch(images[client : client + 1], torch.tensor([client]))
                update, _ = client_step(net, batch, Recipe(update="weights", learning_rate=0.1))
                recorder.received(number, str(client), update.trainable, examples=1)
                np.savez(tmp_path / "truth" / f"{client}.npz", images=batch.images.numpy(), labels=[client])
            net = replace(net, parameters=update.trainable)
    return tmp_path


def run(*arguments: str) -> int:
    code = app(["replay", *arguments], standalone_mode=False)
    return int(code or 0)


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as handle:
        return list(csv.DictReader(handle))


def test_without_truth_no_score_is_claimed(recorded: Path) -> None:
    assert run("recording", "--model", "lenet_dlg", *RECIPE, *LIGHT, "--out", "out") == 0
    rows, cells = table(Path("out/results.csv")), table(Path("out/cells.csv"))
    assert len(rows) == 4
    for row in rows:
        assert row["status"] == "done"
        assert row["objective"]
        assert (Path("out") / row["reconstruction_image"]).is_file()
        assert not any(row[name] for name in ("psnr", "ssim", "mse", "success", "truth_image", "null_nearest_ssim"))
    for cell in cells:
        assert not any(cell[name] for name in ("asr", "ssim_mean", "psnr_mean", "gain_psnr", "recovered"))
    refused = [cell for cell in cells if cell["status"] == "refused"]
    assert {cell["attack"] for cell in refused} == {"first_layer_readout"}
    page = Path("out/report.html").read_text()
    assert "No score is claimed" in page
    assert "no score without ground truth" in page
    assert "counts as reconstructed" not in page


def test_with_truth_the_same_updates_are_scored(recorded: Path) -> None:
    assert run("recording", "--model", "lenet_dlg", "--truth", "truth", *RECIPE, *LIGHT[:2], "--out", "out") == 0
    rows = table(Path("out/results.csv"))
    assert [(row["model"], row["victim"]) for row in rows] == [
        ("lenet_dlg-round-001", "0"), ("lenet_dlg-round-001", "1"), ("lenet_dlg-round-002", "0"), ("lenet_dlg-round-002", "1"),
    ]  # fmt: skip
    for row in rows:
        truth = np.load(Path("out") / row["truth_image"].replace(".png", ".npz"))["image"]
        found = np.load(Path("out") / row["reconstruction_image"].replace(".png", ".npz"))["image"]
        assert float(row["mse"]) == pytest.approx(float(((truth - found) ** 2).mean()), rel=1e-5)
        other = np.load(recorded / "truth" / f"{1 - int(row['victim'])}.npz")["images"][0]
        assert float(row["null_nearest_mse"]) == pytest.approx(float(((truth - other) ** 2).mean()), rel=1e-5)
    assert all(cell["asr"] for cell in table(Path("out/cells.csv")))


def test_a_finished_replay_computes_nothing_again_and_another_one_is_refused(recorded: Path) -> None:
    assert run("recording", "--model", "lenet_dlg", *RECIPE, *LIGHT[:2], "--out", "out") == 0
    before = Path("out/results.csv").read_bytes()
    assert run("recording", "--model", "lenet_dlg", *RECIPE, *LIGHT[:2], "--out", "out") == 0
    assert Path("out/results.csv").read_bytes() == before
    with pytest.raises(InputError, match="other updates, attacks or settings"):
        run("recording", "--model", "lenet_dlg", *RECIPE, "--attack", "{name: gradinv, iterations: 4}", "--out", "out")


def test_updates_that_do_not_fit_fail_alone_with_the_reason(recorded: Path) -> None:
    with Recorder(recorded / "recording") as recorder:
        recorder.received(2, "2", {"something": torch.ones(3)}, examples=1)
        recorder.received(
            2, "3", {name: torch.full_like(one, float("nan")) for name, one in model().parameters.items()}, examples=1
        )
        recorder.received(2, "4", {name: one.bfloat16() for name, one in model().parameters.items()}, examples=1)
        recorder.failed(2, "5", "died")
    assert run("recording", "--model", "lenet_dlg", *RECIPE, *LIGHT[:2], "--round", "2", "--out", "out") == 3
    rows = {row["item"]: row for row in table(Path("out/results.csv"))}
    assert {item[-1]: row["status"] for item, row in rows.items()} == {
        "0": "done", "1": "done", "2": "failed", "3": "failed", "4": "done",
    }  # fmt: skip
    assert "'something'" in rows["round 2, client 2"]["reason"]
    assert "not finite" in rows["round 2, client 3"]["reason"]
    assert any("died" in entry["text"] for entry in json.loads(Path("out/summary.json").read_text())["warnings"])


def test_numbered_arrays_are_taken_in_the_order_of_the_state_dict(recorded: Path) -> None:
    net = model()
    sent = {str(index): one for index, one in enumerate(net.parameters.values())}
    with Recorder(recorded / "numbered") as recorder:
        recorder.sent(1, sent)
        recorder.received(1, "a", {name: one + 0.01 for name, one in sent.items()}, examples=1)
    assert run("numbered", "--model", "lenet_dlg", *RECIPE, *LIGHT[:2], "--classes", "2", "--out", "out") == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing", "--model", "lenet_dlg"], "no recording"),
        (["recording", "--model", "lenet"], "unknown model 'lenet'"),
        (["recording", "--model", "lenet_cpl"], "name the model that it belongs to"),
        (["recording", "--model", "lenet_dlg", "--round", "9"], "rounds 1, 2"),
        (["recording", "--model", "lenet_dlg", "--client", "9"], "there are 0, 1"),
        (["recording", "--model", "lenet_dlg", "--attack", "dgl"], "did you mean 'dlg'"),
        (["recording", "--model", "lenet_dlg", "--recipe", "5"], "--recipe"),
        (["recording", "--model", "lenet_dlg", "--truth", "recording"], "CLIENT.npz"),
        (["recording", "--model", "lenet_dlg", "--key", "none.key"], "--key"),
    ],
)
def test_bad_input_is_one_sentence(recorded: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        run(*arguments, "--size", "12", "--out", "out")
    assert "\n" not in str(caught.value)


def test_of_many_rounds_the_terminal_shows_the_first_and_the_last(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = model()
    with Recorder(recorded / "long") as recorder:
        for number in range(1, 71):
            recorder.sent(number, net.parameters)
            recorder.received(number, "a", {name: one + 0.01 for name, one in net.parameters.items()}, examples=1)
    assert run("long", "--model", "lenet_dlg", "--attack", "first_layer_readout", "--size", "12", "--out", "out") == 0
    shown = capsys.readouterr().out
    assert "round-001" in shown
    assert "round-070" in shown
    assert "round-035" not in shown
    assert "... 10 more in cells.csv" in shown
    with pytest.raises(InputError, match="there are rounds 1 to 70"):
        run("long", "--model", "lenet_dlg", "--round", "71", "--size", "12", "--out", "other")

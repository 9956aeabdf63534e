"""`medpfl replay --diagnose` says why an attack failed: what a user reads of recordings made so that it must."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medpfl.cli.app import app
from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.tasks import SingleLabel
from medpfl.federation.client import client_step
from medpfl.federation.recording import Recorder
from medpfl.models import build_model
from medpfl.report import write_report

QUICK = ("--attack", "{name: idlg, iterations: 12, restarts: 1}")
Sent = Callable[[int, GlobalModel, Batch], Mapping[str, Tensor]]


def images(client: int, count: int) -> Batch:
    """Smooth images, which attacks find in a few steps."""
    stream = torch.Generator().manual_seed(client)
    coarse = torch.rand(count, 1, 4, 4, generator=stream)
    fine = torch.nn.functional.interpolate(coarse, 12, mode="bilinear")
    return Batch(fine, (torch.arange(count) + client) % 2)


def record(
    folder: Path, send: Sent, *, clients: int = 2, count: int = 1, name: str = "lenet_dlg", **received: Any
) -> GlobalModel:
    """A round of so many clients, and their truth."""
    net = build_model(
        name, image_shape=(1, 12, 12), task=SingleLabel(2), generator=torch.Generator().manual_seed(5),
        search_path=(folder,),
    )  # fmt: skip
    (folder / "truth").mkdir()
    with Recorder(folder / "recording") as recorder:
        recorder.sent(1, {**net.parameters, **net.buffers, **net.counters})
        for client in range(clients):
            batch = images(client, count)
            recorder.received(1, f"site-{client}", send(client, net, batch), kind="weights", examples=count, **received)
            np.savez(folder / "truth" / f"site-{client}.npz", images=batch.images.numpy(), labels=batch.targets.numpy())
    return net


def trained(net: GlobalModel, batch: Batch, **recipe: Any) -> dict[str, Tensor]:
    update, _ = client_step(net, batch, Recipe(**{"update": "weights", "learning_rate": 0.1, **recipe}))
    return {**update.trainable, **update.buffers, **update.counters}


def noisy(client: int, net: GlobalModel, batch: Batch) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(100 + client)
    return {
        key: one + 0.02 * torch.randn(one.shape, generator=stream)
        for key, one in trained(net, batch, batch_size=len(batch)).items()
    }


def run(*arguments: str, recipe: str | None = "{learning_rate: 0.1}", truth: bool = True) -> int:
    given = (*(("--recipe", recipe) if recipe else ()), *(("--truth", "truth") if truth else ()))
    code = app(
        [
            "replay",
            "recording",
            "--model",
            "lenet_dlg",
            "--size",
            "12",
            "--diagnose",
            "--out",
            "out",
            *given,
            *arguments,
        ],
        standalone_mode=False,
    )
    return int(code or 0)


def table(name: str) -> list[dict[str, str]]:
    with (Path("out") / name).open() as handle:
        return list(csv.DictReader(handle))


def told(client: str = "site-0") -> dict[str, str]:
    """Sentences about one client's update by the first word of their name."""
    return {row["fact"].partition(":")[0]: row["text"] for row in table("diagnosis.csv") if row["client"] == client}


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_without_truth_it_measures_and_claims_no_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, lambda _, net, batch: trained(net, batch))
    assert run(*QUICK, truth=False) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "how far the search got" in shown
    facts = told()
    assert "Its pictures explain the update" in facts["search"]
    assert "cannot be told without ground truth" in facts["search"]
    assert not {"why", "agreement", "true_loss", "true_labels", "residual"} & set(facts)
    assert not any(row["diagnosis_of"] or row["ssim"] for row in table("results.csv"))
    page = Path("out/report.html").read_text()
    assert "What the recorded updates tell" in page
    assert "There was no ground truth" in page
    assert "What protects these images today" not in page


def test_noise_is_named_as_what_protects(tmp_path: Path) -> None:
    record(tmp_path, noisy, clients=4)
    assert run(*QUICK) == 0
    for client in range(4):
        facts = told(f"site-{client}")
        assert "0 of 1 image comes back" in facts["why"]
        assert "nothing on the update beyond the client's step: 1 of 1 image comes back" in facts["why"]
        assert "standard deviation of 0.0" in facts["noise"]
        assert "noise" in facts["search"]
    (entry,) = json.loads(Path("out/summary.json").read_text())["diagnosis"]
    assert (entry["verdict"], entry["limit"]) == ("limited", "clean_update")
    page = Path("out/report.html").read_text()
    assert "What protects these images today" in page
    assert "what the recorded update has beyond the client&#39;s step" in page


def test_changed_cells_stand_apart_and_change_no_number(tmp_path: Path) -> None:
    record(tmp_path, noisy)
    arguments = ["replay", "recording", "--model", "lenet_dlg", "--size", "12", "--recipe", "{learning_rate: 0.1}",
                 "--truth", "truth", *QUICK, "--out", "out"]  # fmt: skip
    app(arguments, standalone_mode=False)
    before = [{**row, "change": ""} for row in table("cells.csv")]
    assert not Path("out/diagnosis.csv").exists()
    app([*arguments, "--diagnose"], standalone_mode=False)
    own = [row for row in table("cells.csv") if not row["diagnosis_of"]]
    assert own == before
    changed = [row for row in table("results.csv") if row["diagnosis_of"]]
    assert {row["change"] for row in changed} == {"clean_update", "untrained", "all"}
    assert json.loads(Path("out/summary.json").read_text())["counts"]["cases"] == 2
    first = Path("out/results.csv").read_bytes(), Path("out/diagnosis.csv").read_bytes()
    app(arguments, standalone_mode=False)
    assert (Path("out/results.csv").read_bytes(), Path("out/diagnosis.csv").read_bytes()) == first


def test_an_attack_that_works_is_not_run_again(tmp_path: Path) -> None:
    record(tmp_path, lambda _, net, batch: trained(net, batch))
    assert run(*QUICK) == 0
    assert "works on the update as it is: 1 of 1 image comes back" in told()["why"]
    assert not any(row["change"] for row in table("results.csv"))
    (entry,) = json.loads(Path("out/summary.json").read_text())["diagnosis"]
    assert entry["verdict"] == "open"
    assert "Nothing: the attack succeeds as it is" in Path("out/report.html").read_text()


def test_many_images_are_named_as_what_protects(tmp_path: Path) -> None:
    record(tmp_path, lambda _, net, batch: trained(net, batch, batch_size=8), count=8)
    assert run("--attack", "{name: gradinv, iterations: 8}", recipe="{learning_rate: 0.1, batch_size: 8}") == 0
    facts = told()
    assert "mixes 8 images" in facts["images"]
    assert "gives the recorded update" in facts["agreement"]
    changes = {row["change"] for row in table("results.csv") if row["change"]}
    assert {"batch_size_1", "labels_given"} <= changes
    single = [row for row in table("results.csv") if row["change"] == "batch_size_1" and row["victim"] == "0"]
    assert [row["position"] for row in single] == ["0"]
    truth = np.load(Path("out") / single[0]["truth_image"].replace(".png", ".npz"))["image"]
    assert np.allclose(truth, images(0, 8).images[0].numpy())
    assert {row["oracle"] for row in table("results.csv") if row["change"] == "labels_given"} == {"labels"}


def test_a_wrong_recipe_is_named_and_the_right_one_tried(tmp_path: Path) -> None:
    record(tmp_path, lambda _, net, batch: trained(net, batch, batch_size=2, epochs=3), count=2)
    assert run("--attack", "{name: gradinv, iterations: 4}", recipe="{learning_rate: 0.1, batch_size: 2}") == 0
    facts = told()
    assert "The recipe that was given does not explain the update" in facts["recipe_found"]
    assert "epochs: 3" in facts["recipe_found"]
    changes = {row["change"] for row in table("results.csv") if row["change"]}
    assert {"recipe_known", "plain_gradient", "all"} <= changes


NET = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Flatten(), nn.Linear(576, 2))
"""


def test_batch_norm_in_train_mode_is_told_and_taken_away(tmp_path: Path) -> None:
    (tmp_path / "normed_twelve.py").write_text(NET)
    record(tmp_path, lambda _, net, batch: trained(net, batch, batch_size=3, batch_norm="train"), count=3,
           name="normed_twelve:make")  # fmt: skip
    assert run(
        "--model", "normed_twelve:make", "--classes", "2", "--attack", "{name: gradinv, iterations: 4}",
        recipe="{learning_rate: 0.1, batch_size: 3, batch_norm: train}",
    ) == 0  # fmt: skip
    facts = told()
    assert "Batch norm ran in train mode" in facts["batch_norm"]
    assert "counters say 1 batch more" in facts["batch_norm"]
    assert "gives the recorded update" in facts["agreement"]
    assert "batch_norm_eval" in {row["change"] for row in table("results.csv")}
    effects = json.loads(Path("out/summary.json").read_text())["diagnosis"][0]["changes"]
    assert "batch_norm_eval" in {effect["change"] for effect in effects}


def test_an_aggregate_is_taken_apart_for_its_owner(tmp_path: Path) -> None:
    """Three clients' mean does not give an image back; the first client's own update does."""
    net = record(tmp_path, lambda _, net, batch: trained(net, batch), clients=1, count=1)
    parts = [images(client, 1) for client in range(3)]
    mean = {key: sum(trained(net, part)[key] for part in parts) / 3 for key in net.parameters}
    with Recorder(tmp_path / "secure") as recorder:
        recorder.sent(1, net.parameters)
        recorder.received(1, "aggregate", mean, kind="weights", examples=3,
                          config={"clients": 3, "examples_by_client": [1, 1, 1]})  # fmt: skip
    np.savez(
        tmp_path / "truth" / "aggregate.npz",
        images=torch.cat([part.images for part in parts]).numpy(),
        labels=torch.cat([part.targets for part in parts]).numpy(),
    )
    (tmp_path / "recording").rename(tmp_path / "plain")
    (tmp_path / "secure").rename(tmp_path / "recording")
    assert run("--attack", "{name: gradinv, iterations: 8}") == 0
    facts = told("aggregate")
    assert "mean over 3 clients with 3 images" in facts["images"]
    assert "gives the recorded update" in facts["agreement"]
    assert "plain_channel" in {row["change"] for row in table("results.csv")}
    alone = [row for row in table("results.csv") if row["change"] == "plain_channel"]
    assert [row["item"] for row in alone] == ["aggregate/0"]


def test_a_client_without_truth_is_measured_all_the_same(tmp_path: Path) -> None:
    record(tmp_path, lambda _, net, batch: trained(net, batch))
    (tmp_path / "truth" / "site-1.npz").unlink()
    assert run("--attack", "{name: gradinv, iterations: 3}") == 0
    assert "the truth of this client was not given" in told("site-1")["agreement"]
    assert "gives the recorded update" in told("site-0")["agreement"]


def test_an_update_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    record(tmp_path, lambda client, net, batch: trained(net, batch) if client else {"other": torch.ones(2)})
    assert run("--attack", "{name: gradinv, iterations: 3}") == 3
    assert "could not be read" in told("site-0")["unread"]
    assert "'other'" in told("site-0")["unread"]
    assert "why" in told("site-1")


def test_a_shared_report_names_no_client(tmp_path: Path) -> None:
    record(tmp_path, noisy)
    assert run("--attack", "{name: gradinv, iterations: 3}") == 0
    page = write_report(Path("out"), images=False).read_text()
    assert "What the recorded updates tell" in page
    assert "site-0" not in page
    assert "site-1" not in page
    app(["export", "out", "--without-images", "--to", "shared"], standalone_mode=False)
    rows = csv.DictReader(Path("shared/diagnosis.csv").read_text().splitlines())
    assert {row["client"] for row in rows} == {"1", "2"}
    for file in Path("shared").iterdir():
        assert "site-" not in file.read_text(), file

"""Several recordings in one replay: tables and report keep them apart, and settings find the recording they belong to."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medpfl.audit.replay import by_recording, recording_names, truth_folders
from medpfl.cli.app import app
from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.errors import InputError
from medpfl.core.tasks import SingleLabel
from medpfl.federation.client import client_step
from medpfl.federation.recording import About, Recorder
from medpfl.models import build_model

NOISE = 0.05
COMMON = ("--model", "lenet_dlg", "--size", "12", "--recipe", "{learning_rate: 0.1}", "--out", "out")
NAIVE = ("--attack", "{name: idlg, iterations: 2}")
INFORMED = ("--attack", "{name: maximum_a_posteriori, prior: total_variation, iterations: 3}")


def model() -> GlobalModel:
    return build_model(
        "lenet_dlg", image_shape=(1, 12, 12), task=SingleLabel(2), generator=torch.Generator().manual_seed(0)
    )


def record(folder: Path, name: str, noise: float, rounds: int = 2, channel: str = "plain") -> None:
    """Two clients with one image each, and their truth; behind a channel only the mean."""
    stream = torch.Generator().manual_seed(2)
    images = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    net = model()
    (folder / f"{name}-truth").mkdir(parents=True)
    about = About(source="a test", defense=f"noise of {noise}" if noise else "", channel=channel)
    with Recorder(folder / name, about) as recorder:
        for number in range(1, rounds + 1):
            recorder.sent(number, net.parameters)
            received = []
            for client in (0, 1):
                batch = Batch(images[client : client + 1], torch.tensor([client]))
                update, _ = client_step(net, batch, Recipe(update="weights", learning_rate=0.1))
                received.append(
                    {
                        key: one + noise * torch.randn(one.shape, generator=stream)
                        for key, one in update.trainable.items()
                    }
                )
            mean = {key: (received[0][key] + received[1][key]) / 2 for key in received[0]}
            if channel == "plain":
                for client in (0, 1):
                    recorder.received(number, str(client), received[client], examples=1)
                    np.savez(
                        folder / f"{name}-truth" / f"{client}.npz", images=images[client : client + 1], labels=[client]
                    )
            else:
                recorder.received(number, "aggregate", mean, examples=2, config={"clients": 2})
                np.savez(folder / f"{name}-truth" / "aggregate.npz", images=images, labels=[0, 1])
            net = replace(net, parameters=mean)


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    record(tmp_path, "plain", 0.0)
    record(tmp_path, "noise", NOISE)
    record(tmp_path, "secure", 0.0, channel="secagg_plus")
    return tmp_path


def run(*arguments: str) -> int:
    return int(app(["replay", *arguments], standalone_mode=False) or 0)


def table(path: str) -> list[dict[str, str]]:
    with Path(path).open() as handle:
        return list(csv.DictReader(handle))


def test_each_recording_is_a_line_of_its_own_and_scores_are_those_of_a_replay_alone(recorded: Path) -> None:
    assert run("plain", "noise", "secure", *COMMON, *NAIVE, "--truth", ".") == 0
    together = table("out/results.csv")
    assert {row["dataset"] for row in together} == {"plain", "noise", "secure"}
    assert [row["channel"] for row in together if row["dataset"] == "secure"] == ["secagg_plus"] * 4
    assert run("plain", *COMMON[:-1], "alone", *NAIVE, "--truth", "plain-truth") == 0
    alone = table("alone/results.csv")
    assert len(alone) == 4
    for one, other in zip(alone, [row for row in together if row["dataset"] == "plain"], strict=True):
        assert one["case"] == other["case"]
        assert float(one["mse"]) == float(other["mse"])


def test_the_report_shows_every_round_of_every_recording(recorded: Path) -> None:
    run("plain", "noise", "secure", *COMMON, *NAIVE, "--truth", ".")
    page = Path("out/report.html").read_text()
    rounds = page[page.index('id="rounds"') : page.index('id="cells"')]
    assert rounds.count("<figure") == 3
    means = [float(cell["ssim_mean"]) for cell in table("out/cells.csv")]
    shown = re.findall(r'<td class="number">(-?[\d.]+) <span class="small">', rounds)
    assert sorted(shown) == sorted(f"{mean:.2f}" for mean in means)
    for name in ("plain", "noise", "secure"):
        assert f'<th scope="row" role="rowheader">{name}</th>' in page
    assert "3 recordings" in page
    assert "secagg_plus over 2 clients" in page
    assert "save the spec" not in page


def test_attackers_know_the_defense_of_the_recording_it_was_named_for_and_only_if_they_can_use_it(
    recorded: Path,
) -> None:
    known = ("--defense", f"noise={{name: gaussian, std: {NOISE}}}")
    assert run("plain", "noise", *COMMON, *NAIVE, *INFORMED, *known, "--round", "1") == 0
    cells = {(cell["dataset"], cell["attack"]): cell for cell in table("out/cells.csv")}
    informed = {key for key, cell in cells.items() if cell["adaptive"] == "true"}
    assert informed == {("noise", "maximum_a_posteriori")}
    told = json.loads(cells["noise", "maximum_a_posteriori"]["threat_model_params"])
    assert told["knows"] == ["defense"]
    assert json.loads(cells["noise", "idlg"]["defense_params"])["std"] == NOISE


def test_a_recording_without_truth_stands_unscored_beside_one_with(recorded: Path) -> None:
    assert run("plain", "noise", *COMMON, *NAIVE, "--round", "1", "--truth", "plain=plain-truth") == 0
    scored = {row["dataset"] for row in table("out/results.csv") if row["ssim"]}
    assert scored == {"plain"}
    page = Path("out/report.html").read_text()
    assert "no ground truth, so no score" in page
    titles = [entry["title"] for entry in json.loads(Path("out/summary.json").read_text())["assumptions"]]
    assert "No ground truth" in titles


def test_recipes_belong_to_recordings(recorded: Path) -> None:
    given = ("--recipe", "noise={learning_rate: 0.2}", *COMMON)
    assert run("plain", "noise", *given, *NAIVE, "--round", "1") == 0
    rates = {cell["dataset"]: json.loads(cell["recipe_params"])["learning_rate"] for cell in table("out/cells.csv")}
    assert rates == {"plain": 0.1, "noise": 0.2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plain", "plain"], "two recordings would be called"),
        (["plain", "noise", "--recipe", "noise={}", "--recipe", "noise={}"], "given twice for noise"),
        (["plain", "noise", "--truth", "noise=nowhere"], "CLIENT.npz"),
        (["plain", "noise", "--defense", "noise={name: gausian}"], "did you mean 'gaussian'"),
        (["plain", "secure", "--client", "1"], "in 'secure'; there are aggregate"),
    ],
)
def test_bad_input_is_one_sentence(recorded: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        run(*arguments, *COMMON)
    assert "\n" not in str(caught.value)


def test_names_and_values() -> None:
    assert recording_names([Path("/a/x y")]) == ("x-y",)
    assert by_recording([], ["a"], "--recipe") == {}
    assert truth_folders(["a=b"], ["plain"]) == {"plain": Path("a=b")}

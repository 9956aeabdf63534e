"""Models of an audit: trained once and only when cases need them, and the same ones when an audit is resumed."""

from __future__ import annotations

import csv
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from medpfl.audit import estimate as estimate_module
from medpfl.audit import materials as materials_module
from medpfl.audit import parse_spec, run_audit
from medpfl.audit.context import describe
from medpfl.audit.estimate import estimate, training_seconds
from medpfl.audit.grid import cells
from medpfl.audit.materials import Materials
from medpfl.audit.plan import Plan
from medpfl.audit.preparation import prepare
from medpfl.audit.snapshots import FileSession
from medpfl.core.domain import GlobalModel
from medpfl.core.errors import InputError, SpecError, StoreError
from medpfl.federation.training import train

DATA = {"name": "films", "reader": "phantom", "kind": "chest", "count": 30, "size": 16, "victims": 2}
TRAINED = {"name": "lenet_dlg", "state": {"trained": {"steps": 8, "batch_size": 4}}}


def plain(**changes: Any) -> dict[str, Any]:
    return {"data": [DATA], "models": [TRAINED], "attacks": [{"name": "cpl", "iterations": 1}], **changes}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as handle:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(handle)]


class Heard:
    """A listener that keeps what it hears of training."""

    def __init__(self) -> None:
        self.training_of: list[tuple[str, float]] = []

    def update(self, done: float, total: int, failed: int) -> None:
        pass

    def training(self, model: str, fraction: float) -> None:
        self.training_of.append((model, fraction))

    def utility(self, done: float, total: int) -> None:
        pass


def trained(base: Path, cache: Path, training: Any = None) -> GlobalModel:
    spec = parse_spec(plain(), base)
    (cell,) = cells(spec)
    return Materials(spec, cache, {}, training=training).model(cell, 0)


def test_nothing_is_trained_before_cases_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("trained although nothing is computed")

    monkeypatch.setattr(materials_module, "train", never)
    spec = parse_spec(plain(), tmp_path)
    prepared = prepare(spec, tmp_path / "cache", Plan())
    assert len(prepared.runnable) == 1
    assert describe(spec, prepared.cells, prepared.materials)["findings"]
    assert estimate(prepared)[0].cases == 2


def test_the_estimate_of_training_grows_with_steps_and_seeds(tmp_path: Path) -> None:
    def seconds(steps: int, seeds: list[int]) -> float:
        model = {"name": "lenet_dlg", "state": {"trained": {"steps": steps, "batch_size": 4}}}
        return training_seconds(prepare(parse_spec(plain(models=[model], seeds=seeds), tmp_path), tmp_path, Plan()))

    assert seconds(100_000, [0, 1]) > 20 * seconds(100, [0]) > 0
    assert training_seconds(prepare(parse_spec(plain(models=["lenet_dlg"]), tmp_path), tmp_path, Plan())) == 0


def test_images_to_train_on_are_missed_before_anything_is_computed(tmp_path: Path) -> None:
    spec = parse_spec(plain(data=[{**DATA, "count": 4, "near_duplicates": 1.0, "victims": 4}]), tmp_path)
    with pytest.raises(SpecError, match="leaves no images to train on"):
        prepare(spec, tmp_path / "cache", Plan())


def test_an_audit_says_that_it_trains_and_keeps_the_model(tmp_path: Path) -> None:
    heard = Heard()
    run_audit(parse_spec(plain(), tmp_path), tmp_path / "out", workers=0, listener=heard)
    assert {name for name, _ in heard.training_of} == {"films/lenet_dlg/s0"}
    fractions = [fraction for _, fraction in heard.training_of]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    again = Heard()
    more = plain(defenses=["none", {"name": "gaussian", "std": 0.1}])
    assert run_audit(parse_spec(more, tmp_path), tmp_path / "out", workers=0, listener=again).computed == 1
    assert again.training_of == []
    assert not list((tmp_path / "out" / "cache").glob("*.pt"))


def test_workers_train_as_one_process_does(tmp_path: Path) -> None:
    changes = {"data": [{**DATA, "victims": 9}], "seeds": [0, 1]}
    run_audit(parse_spec(plain(**changes), tmp_path), tmp_path / "one", workers=0)
    run_audit(parse_spec(plain(**changes), tmp_path), tmp_path / "two", workers=2)
    assert rows(tmp_path / "one") == rows(tmp_path / "two")
    assert len(list((tmp_path / "two" / "cache").glob("*.safetensors"))) == 2


def test_a_model_that_is_being_trained_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[float] = []

    def slow(*arguments: Any) -> Any:
        runs.append(time.monotonic())
        time.sleep(0.3)
        return train(*arguments)

    monkeypatch.setattr(materials_module, "train", slow)
    found: list[GlobalModel] = []
    threads = [threading.Thread(target=lambda: found.append(trained(tmp_path, tmp_path / "cache"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(runs) == 1
    first, second = found
    assert all(torch.equal(first.parameters[name], second.parameters[name]) for name in first.parameters)


def test_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(tmp_path, tmp_path / "whole")
    monkeypatch.setattr(materials_module, "FileSession", partial(FileSession, interval=-1.0))
    steps: list[int] = []
    checkpoint = FileSession.checkpoint

    def stops(self: FileSession, done: int, total: int, state: Any) -> None:
        checkpoint(self, done, total, state)
        steps.append(done)
        if steps == [1, 2, 3]:
            raise KeyboardInterrupt

    monkeypatch.setattr(FileSession, "checkpoint", stops)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, tmp_path / "stopped")
    resumed = trained(tmp_path, tmp_path / "stopped")
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(torch.equal(whole.parameters[name], resumed.parameters[name]) for name in whole.parameters)
    assert not list((tmp_path / "stopped").glob("*.pt"))


NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, channels, size, classes):
        super().__init__()
        self.last = nn.Linear(channels * size * size, classes)
        nn.init.constant_(self.last.weight, {weight})

    def forward(self, images):
        return {forward}
"""
SENT = "self.last(torch.sigmoid(images.flatten(1)))"
MORE = ["none", {"name": "gaussian", "std": 0.1}]


def write_net(folder: Path, weight: float = 0.01, forward: str = SENT) -> dict[str, Any]:
    sys.modules.pop("nets_of_ours", None)
    (folder / "nets_of_ours.py").write_text(NET.format(weight=weight, forward=forward))
    return {"factory": "nets_of_ours:Net"}


@pytest.mark.parametrize(
    "change",
    [{"weight": 0.0101}, {"forward": SENT.replace("sigmoid", "tanh")}],
    ids=["another initialization", "the same tensors, another computation"],
)
@pytest.mark.parametrize("state", ["untrained", TRAINED["state"]], ids=["untrained", "trained"])
def test_a_changed_factory_is_refused(
    change: dict[str, Any], state: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    out = tmp_path / "out"
    model = {**write_net(tmp_path), "state": state}
    run_audit(parse_spec(plain(models=[model]), tmp_path), out, workers=0)
    before = rows(out)
    write_net(tmp_path, **change)
    for defenses in (["none"], MORE):
        with pytest.raises(StoreError, match=r"the model films/Net/s0 is not the one .*--out"):
            run_audit(parse_spec(plain(models=[model], defenses=defenses), tmp_path), out, workers=0)
    assert rows(out) == before
    write_net(tmp_path)
    assert run_audit(parse_spec(plain(models=[model], defenses=MORE), tmp_path), out, workers=0).counts["done"] == 4


def test_a_changed_checkpoint_is_refused(tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "net.pt"
    model = {**write_net(tmp_path), "state": "./net.pt"}
    weights = {"last.weight": torch.full((3, 256), 0.01), "last.bias": torch.zeros(3)}
    torch.save(weights, path)
    run_audit(parse_spec(plain(models=[model]), tmp_path), out, workers=0)
    before = rows(out)
    weights["last.bias"][0] = 1e-7
    torch.save(weights, path)
    with pytest.raises(StoreError, match=r"the model films/Net/s0 .*checkpoint.*--out"):
        run_audit(parse_spec(plain(models=[model], defenses=MORE), tmp_path), out, workers=0)
    assert rows(out) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_another_trained_model_is_refused_before_its_cases_are_computed(workers: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_audit(parse_spec(plain(), tmp_path), out, workers=0)
    before = rows(out)
    (path,) = (out / "cache").glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    original, tensors = path.read_bytes(), load_file(path)
    save_file({name: tensor * 1.001 for name, tensor in tensors.items()}, path, metadata=metadata)
    more = parse_spec(plain(defenses=MORE), tmp_path)
    with pytest.raises(InputError, match=r"the trained model films/lenet_dlg/s0 .*--out"):
        run_audit(more, out, workers=workers)
    assert rows(out) == before
    path.write_bytes(original)
    assert run_audit(more, out, workers=0).counts["done"] == 4


def test_a_model_whose_cached_file_was_deleted_is_trained_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_audit(parse_spec(plain(), tmp_path), out, workers=0)
    (path,) = (out / "cache").glob("*.safetensors")
    path.unlink()
    assert run_audit(parse_spec(plain(defenses=MORE), tmp_path), out, workers=0).counts["done"] == 4


STAGES = [
    {"name": "lenet_dlg", "label": f"epochs-{epochs}", "state": {"trained": {"epochs": epochs, "batch_size": 4}}}
    for epochs in (0, 1, 3)
]


def test_stages_share_one_training_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def counted(*arguments: Any) -> Any:
        model, history = train(*arguments)
        runs.append(len(history))
        return model, history

    monkeypatch.setattr(materials_module, "train", counted)
    spec = parse_spec(plain(models=STAGES), tmp_path)
    known = {cell.model.id: cell for cell in cells(spec)}
    materials = Materials(spec, tmp_path / "cache", {})
    models = {name: materials.model(cell, 0) for name, cell in known.items()}
    assert len(runs) == 1
    steps = runs[0] // 3
    assert known["epochs-0"].model.state == "untrained"
    weight = {name: next(iter(model.parameters.values())) for name, model in models.items()}
    assert not torch.equal(weight["epochs-0"], weight["epochs-1"])
    assert not torch.equal(weight["epochs-1"], weight["epochs-3"])
    alone = parse_spec(plain(models=[STAGES[1]]), tmp_path)
    (cell,) = cells(alone)
    again = Materials(alone, tmp_path / "other", {}).model(cell, 0)
    assert runs[1:] == [steps]
    assert all(torch.equal(again.parameters[name], models["epochs-1"].parameters[name]) for name in again.parameters)


def test_a_stage_that_is_asked_for_first_leaves_the_others(tmp_path: Path) -> None:
    spec = parse_spec(plain(models=STAGES), tmp_path)
    run_audit(spec, tmp_path / "out", workers=0)
    kept = sorted((tmp_path / "out" / "cache").glob("*.safetensors"))
    assert len(kept) == 2
    before = rows(tmp_path / "out")
    kept[0].unlink()
    longer = {**STAGES[2], "label": "epochs-4", "state": {"trained": {"epochs": 4, "batch_size": 4}}}
    run_audit(parse_spec(plain(models=[*STAGES, longer]), tmp_path), tmp_path / "out", workers=0)
    found = [row for row in rows(tmp_path / "out") if row["model"] != "epochs-4"]
    assert found == before
    assert len(list((tmp_path / "out" / "cache").glob("*.safetensors"))) == 3


def test_training_of_stages_is_estimated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "shortest", lambda *_: 1.0)

    def seconds(models: list[dict[str, Any]]) -> float:
        return training_seconds(prepare(parse_spec(plain(models=models), tmp_path), tmp_path, Plan()))

    assert seconds(STAGES) == seconds(STAGES[2:]) == 3 * seconds(STAGES[1:2]) > 0
    assert seconds(STAGES[:1]) == 0

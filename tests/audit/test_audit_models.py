"""Models of an audit: trained once and only when cases need them, and the same ones when an audit is resumed."""

from __future__ import annotations

import csv
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from medpfl.audit import materials as materials_module
from medpfl.audit import parse_spec, run_audit
from medpfl.audit.context import describe
from medpfl.audit.estimate import estimate
from medpfl.audit.grid import cells
from medpfl.audit.materials import Materials
from medpfl.audit.plan import Plan
from medpfl.audit.preparation import prepare
from medpfl.audit.snapshots import FileSession
from medpfl.core.domain import GlobalModel
from medpfl.core.errors import SpecError
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


def trained(base: Path, cache: Path, training: Any = None) -> GlobalModel:
    spec = parse_spec(plain(), base)
    (cell,) = cells(spec)
    return Materials(spec, cache, {"films": 1}, training=training).model(cell.dataset, cell.model, 0)


def test_nothing_is_trained_before_cases_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("trained although nothing is computed")

    monkeypatch.setattr(materials_module, "train", never)
    spec = parse_spec(plain(), tmp_path)
    prepared = prepare(spec, tmp_path / "cache", Plan())
    assert len(prepared.runnable) == 1
    assert describe(spec, prepared.cells, prepared.materials)["findings"]
    assert estimate(prepared)[0].cases == 2


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

"""An audit on another device: the same results, the device in the plan, and clear words where it cannot be had."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretended_device import DEVICE, pretended_device

from medpfl.audit import parse_spec, run_audit
from medpfl.audit.estimate import estimate
from medpfl.audit.plan import Plan, make_plan
from medpfl.audit.preparation import prepare
from medpfl.audit.runner import default_workers
from medpfl.core.errors import SpecError, StoreError

SPEC: dict[str, Any] = {
    "data": [{"name": "skin", "reader": "phantom", "kind": "skin", "size": 16, "victims": 2, "channels": 3}],
    "models": [
        {"name": "lenet_dlg", "normalize": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}},
        {"name": "lenet_idlg", "state": {"trained": {"steps": 2}}, "only": {"attack": ["gradinv"]}},
    ],
    "recipes": [{"batch_size": 2}],
    "threat_models": [{"name": "honest_server", "knows": ["labels", "logits", "batch_norm_statistics", "auxiliary"]}],
    "defenses": ["none", {"name": "laplace", "scale": 1e-6}],
    "attacks": [
        {"name": "gradinv", "iterations": 5},
        {"name": "dlg", "iterations": 1, "inner_iterations": 5},
    ],
}


def results(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_an_audit_on_a_device_gives_the_results_of_the_cpu(tmp_path: Path, monkeypatch: Any) -> None:
    spec = parse_spec(SPEC, tmp_path)
    run_audit(spec, tmp_path / "cpu", workers=0)
    monkeypatch.setattr("medpfl.audit.runner.make_plan", lambda *_: Plan(device=DEVICE.type))
    with pretended_device():
        run_audit(spec, tmp_path / "device", workers=0)
    found, expected = results(tmp_path / "device"), results(tmp_path / "cpu")
    assert len(found) == len(expected) == 24
    for one, other in zip(found, expected, strict=True):
        assert one["case"] == other["case"]
        assert one["status"] == other["status"] == "done"
        assert float(one["psnr"]) == pytest.approx(float(other["psnr"]), abs=0.1)
        assert one["label_inferred"] == other["label_inferred"]


def test_another_device_would_not_fit_earlier_results(tmp_path: Path, monkeypatch: Any) -> None:
    spec = parse_spec({**SPEC, "models": ["lenet_dlg"], "attacks": SPEC["attacks"][1:]}, tmp_path)
    run_audit(spec, tmp_path / "out", workers=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run_audit(spec, tmp_path / "out", workers=0).computed == 0  # `auto` stays where the audit was started
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=10**10))
    with pytest.raises(StoreError, match="another plan \\(device cpu -> cuda, accelerator  -> a GPU"):
        run_audit(spec, tmp_path / "out", workers=0, device="cuda")


def test_devices_and_threads_of_a_plan(tmp_path: Path, monkeypatch: Any) -> None:
    def planned(**keys: Any) -> Plan:
        return make_plan(parse_spec({**SPEC, **keys}, tmp_path))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert planned().device == planned(device="cpu").device == "cpu"
    assert default_workers(planned(threads=1000)) == 1
    with pytest.raises(SpecError, match="device: 'cuda' was asked for, but PyTorch finds no GPU here"):
        planned(device="cuda")
    with pytest.raises(SpecError, match="threads: expected a whole number from 1 on, found 0"):
        planned(threads=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=10**10))
    assert planned() == Plan(device="cuda", accelerator="GPU 0", memory=8 * 10**9)
    assert planned(device="cuda:2").accelerator == "GPU 2"
    assert default_workers(planned()) == 3
    with pytest.raises(SpecError, match="there are 3 GPUs, counted from cuda:0"):
        planned(device="cuda:3")


def test_memory_is_part_of_the_plan_and_kept_when_an_audit_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    plain = {**SPEC, "models": ["lenet_dlg"], "attacks": SPEC["attacks"][:1], "defenses": ["none"]}
    spec = parse_spec(plain, tmp_path)
    assert make_plan(parse_spec({**plain, "memory": "1.5 GiB"}, tmp_path)).memory == 3 * 2**29
    with pytest.raises(SpecError, match=r"memory: expected .* such as 4 GB or 500 MB, found 'lots'"):
        parse_spec({**plain, "memory": "lots"}, tmp_path)
    run_audit(spec, tmp_path / "out", workers=0)
    monkeypatch.setattr("medpfl.core.memory.machine_memory", lambda: 10**8)  # a smaller machine
    assert run_audit(spec, tmp_path / "out", workers=0).computed == 0
    with pytest.raises(StoreError, match=r"another plan .*memory"):
        run_audit(parse_spec({**plain, "memory": "1 MB"}, tmp_path), tmp_path / "out", workers=0)


def test_check_tells_what_one_candidate_takes(tmp_path: Path) -> None:
    plain = {**SPEC, "attacks": SPEC["attacks"][:1], "defenses": ["none"], "models": ["lenet_dlg", "resnet18_cifar"]}
    spec = parse_spec(plain, tmp_path)
    small, large = estimate(prepare(spec, tmp_path / "cache", make_plan(spec)))
    weights = 4 * 11_168_832  # of a ResNet18 without its last layer
    assert 2 * weights < large.memory < 12 * weights  # gradient and its derivative, and 2 images of 16 x 16
    assert small.memory < large.memory / 50


def test_a_small_budget_cuts_the_batch_and_changes_nothing_else(tmp_path: Path) -> None:
    plain = {**SPEC, "models": ["lenet_dlg"], "attacks": SPEC["attacks"][:1], "defenses": ["none"]}
    tables = []
    for name, memory in (("large", "1 GB"), ("small", "1 MB")):
        run_audit(parse_spec({**plain, "memory": memory}, tmp_path), tmp_path / name, workers=0)
        tables.append(results(tmp_path / name))
    for one, other in zip(*tables, strict=True):
        assert float(one["psnr"]) == pytest.approx(float(other["psnr"]), abs=0.01)


def test_lack_of_memory_fails_the_case_with_a_way_out(tmp_path: Path, monkeypatch: Any) -> None:
    def greedy(*_: Any, **__: Any) -> Any:
        return torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr("medpfl.attacks.matching.inversion.search", greedy)
    plain = {**SPEC, "models": ["lenet_dlg"], "attacks": SPEC["attacks"][:1], "defenses": ["none"]}
    summary = run_audit(parse_spec(plain, tmp_path), tmp_path / "out", workers=0)
    assert summary.counts["failed"] == 2
    assert all(row["reason"].startswith("out of memory: let each worker") for row in results(tmp_path / "out"))

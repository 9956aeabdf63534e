"""A small finished audit as files, written by hand: two data sets, defenses, an oracle, failures, hostile texts."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from medpfl.metrics.cells import summarize_cell
from medpfl.metrics.recovery import recovery_rates
from medpfl.report.views import AXES

HOSTILE = """<script>alert(1)</script>"'&{{ 7 * 7 }}$x_1$"""
"""A name that must appear as text and nothing else."""

Pixels = NDArray[np.float64]

DEFAULT_PARAMS: dict[str, dict[str, Any]] = {
    "dataset": {"name": "brain", "reader": "folder"},
    "model": {"name": "lenet_dlg", "state": "untrained"},
    "recipe": {"update": "gradient", "batch_size": 1, "batch_norm": "eval"},
    "threat_model": {"name": "eavesdropper", "knows": []},
    "channel": {"name": "plain"},
    "defense": {"name": "none"},
    "guard": {"name": "none"},
    "attack": {"name": "dlg", "iterations": 300},
}


@dataclass
class CellSpec:
    """What the fake audit says about one cell: `noise` is the standard deviation of its reconstructions' error."""

    dataset: str = "brain"
    model: str = "lenet_dlg"
    defense: str = "none"
    attack: str = "dlg"
    oracle: str = ""
    adaptive: bool = False
    noise: float = 0.01
    status: str = "done"
    reason: str = ""
    failed: dict[int, str] = field(default_factory=dict)
    blocked: dict[int, str] = field(default_factory=dict)
    images: int = 1
    params: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def axes(self) -> dict[str, str]:
        """Ids of the entries."""
        return {
            "dataset": self.dataset,
            "model": self.model,
            "recipe": "gradient-b1",
            "threat_model": "eavesdropper",
            "channel": "plain",
            "defense": self.defense,
            "guard": "none",
            "attack": self.attack,
        }

    @property
    def id(self) -> str:
        """The `cell` column."""
        return "/".join(self.axes.values())


def picture(seed: int, channels: int = 1, size: int = 32) -> Pixels:
    """A smooth picture, (size, size) or (size, size, 3)."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    planes = []
    for _ in range(channels):
        plane = 0.15 * np.ones((size, size))
        for _ in range(5):
            cy, cx, width = generator.uniform(0.2, 0.8), generator.uniform(0.2, 0.8), generator.uniform(0.05, 0.2)
            plane += generator.uniform(0.2, 0.6) * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * width**2))
        planes.append(plane.clip(0, 1))
    return planes[0] if channels == 1 else np.stack(planes, axis=-1)


def scores(truth: Pixels, other: Pixels) -> tuple[float, float]:
    """PSNR and SSIM by scikit-image."""
    axis = -1 if truth.ndim == 3 else None
    return (
        float(peak_signal_noise_ratio(truth, other, data_range=1.0)),  # type: ignore[no-untyped-call]
        float(structural_similarity(truth, other, data_range=1.0, channel_axis=axis)),  # type: ignore[no-untyped-call]
    )


def write_png(path: Path, image: Pixels) -> None:
    """An 8-bit PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.round(image.clip(0, 1) * 255).astype(np.uint8)).save(path)


def cell_rows(folder: Path, spec: CellSpec, victims: int) -> list[dict[str, Any]]:
    """Rows of `results.csv` of one cell, with its PNGs."""
    rows: list[dict[str, Any]] = []
    channels = 3 if spec.dataset == "skin" else 1
    for victim in range(victims):
        case = f"{spec.id}/s0/v{victim}"
        for position in range(spec.images):
            key = 100 * victim + position
            truth, other = picture(key, channels), picture(5000 + key, channels)
            row: dict[str, Any] = {
                "case": case, "cell": spec.id, "seed": 0, **spec.axes, "oracle": spec.oracle,
                "adaptive": spec.adaptive, "victim": victim, "client": 0, "position": position,
                "item": f"glioma/patient_{victim}_{position}.png", "status": "done", "reason": None, "success": False,
                "seconds": 1.5,
            }  # fmt: skip
            stopped = spec.failed | spec.blocked
            if victim in stopped:
                row |= {"status": "failed" if victim in spec.failed else "blocked", "reason": stopped[victim]}
                rows.append(row)
                continue
            generator = np.random.default_rng([victim, position, len(spec.id)])
            returned = (truth + generator.normal(0, spec.noise * (1 + victim), truth.shape)).clip(0, 1)
            psnr, ssim = scores(truth, returned)
            null_psnr, null_ssim = scores(truth, other)
            noise_psnr, noise_ssim = scores(truth, generator.uniform(size=truth.shape))
            truth_path = f"images/truth/{spec.dataset}/s0-v{victim}-p{position}.png"
            returned_path = f"images/{zlib.crc32(spec.id.encode())}/s0-v{victim}-p{position}.png"
            write_png(folder / truth_path, truth)
            write_png(folder / returned_path, returned)
            row |= {
                "psnr": psnr, "ssim": ssim, "mse": float(((truth - returned) ** 2).mean()), "success": ssim >= 0.9,
                "label": victim % 4, "label_inferred": victim % 4, "label_correct": True, "legacy_ssim": 0.99,
                "legacy_mse": 0.5, "candidate": 0, "candidates": 1, "objective": 1e-6, "gradient_evaluations": 300,
                "stop_reason": "iterations", "truth_image": truth_path, "reconstruction_image": returned_path,
                "null_class_mean_psnr": null_psnr - 1, "null_class_mean_ssim": null_ssim - 0.05,
                "null_nearest_psnr": null_psnr, "null_nearest_ssim": null_ssim,
                "null_noise_psnr": noise_psnr, "null_noise_ssim": noise_ssim,
            }  # fmt: skip
            rows.append(row)
    return rows


def write_audit(
    folder: Path, cells: list[CellSpec], *, victims: int = 6, summary: dict[str, Any] | None = None, spec_text: str = ""
) -> Path:
    """Writes an output folder with these cells; `summary` overrides keys of `summary.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    counts = {"cells": len(cells), "refused": 0, "cases": 0, "done": 0, "failed": 0, "blocked": 0}
    for spec in cells:
        params = {axis: {**DEFAULT_PARAMS[axis], "name": spec.axes[axis], **spec.params.get(axis, {})} for axis in AXES}
        row: dict[str, Any] = {"cell": spec.id, **spec.axes}
        row |= {f"{axis}_params": json.dumps(params[axis]) for axis in AXES}
        row |= {"oracle": spec.oracle, "adaptive": spec.adaptive, "status": spec.status, "reason": spec.reason}
        if spec.status == "refused":
            counts["refused"] += 1
        else:
            rows = cell_rows(folder, spec, victims)
            results += rows
            row |= summarize_cell(pd.DataFrame(rows), threshold=0.9, seed=0)
            row |= recovery_rates(pd.DataFrame(rows), seed=0)
            counts["cases"] += victims
            counts["failed"] += len(spec.failed)
            counts["blocked"] += len(spec.blocked)
            counts["done"] += victims - len(spec.failed) - len(spec.blocked)
        table.append(row)
    for name, rows in (("results.csv", results), ("cells.csv", table)):
        frame = pd.DataFrame(rows).astype(object)
        for column in frame:
            frame[column] = [
                str(value).lower() if isinstance(value, (bool, np.bool_)) else value for value in frame[column]
            ]
        frame.to_csv(folder / name, index=False)
    written = {
        "schema": 1,
        "name": "brain and skin before go-live",
        "created": "2026-03-04T12:30:00+00:00",
        "finished": True,
        "threshold": 0.9,
        "limit": None,
        "counts": counts,
        "seconds": 372.5,
        "data": [],
        "assumptions": [],
        "findings": [],
        "warnings": [],
        "versions": {"medpfl": "0.1.0", "torch": "2.13.0"},
        "hardware": {"cpu": "2 cores", "memory": "24 GB"},
        "plan": {"threads": 1, "device": "cpu"},
        **(summary or {}),
    }
    (folder / "summary.json").write_text(json.dumps(written), encoding="utf-8")
    (folder / "spec.yaml").write_text(spec_text or "name: brain and skin before go-live\nseed: 0\n", encoding="utf-8")
    return folder


def example_cells() -> list[CellSpec]:
    """A grid with everything that a report must tell apart."""
    laplace = {"defense": {"name": "laplace", "scale": 0.01}}
    cells = []
    for dataset in ("brain", "skin"):
        hard = 6.0 if dataset == "skin" else 1.0
        cells += [
            CellSpec(dataset, attack="dlg", noise=0.008 * hard),
            CellSpec(dataset, attack="cpl", noise=0.004 * hard, failed={2: f"singular matrix in {HOSTILE}"}),
            CellSpec(dataset, attack="dlg", defense="laplace-100", noise=0.06 * hard, params=laplace),
            CellSpec(dataset, attack="cpl", defense="laplace-100", noise=0.05 * hard, params=laplace),
            CellSpec(
                dataset, attack="cpl-informed", defense="laplace-100", noise=0.03 * hard, adaptive=True, params=laplace
            ),
            CellSpec(dataset, attack="dlg", defense=HOSTILE, noise=0.02 * hard, params=laplace),
        ]
    cells.append(CellSpec("brain", model="resnet18_cifar", attack="gradinv", oracle="labels", noise=0.002))
    cells.append(
        CellSpec(
            "skin", model="resnet18_cifar", attack="first_layer_readout", status="refused",
            reason=f"the first trainable layer of {HOSTILE} is not dense",
        )
    )  # fmt: skip
    return cells


def example_summary() -> dict[str, Any]:
    """The parts of `summary.json` that the example fills."""
    return {
        "limit": {"text": "asr <= 0.05", "holds": False},
        "data": [
            {
                "dataset": name, "seed": 0, "images": 96, "victims": 6, "training": 30, "auxiliary": 30, "null": 28,
                "near_duplicates": 2, "dropped_by_patient": 0, "notes": [f"source {HOSTILE}", "no patient key"],
            }
            for name in ("brain", "skin")
        ],
        "assumptions": [{"title": f"Untrained {HOSTILE}", "text": "Random weights are an upper bound."}],
        "findings": [{"model": "resnet18_cifar", "severity": "warning", "message": f"batch norm {HOSTILE}"}],
        "warnings": [f"laplace-100: noise without clipping has no privacy guarantee {HOSTILE}"],
        "diagnosis": [example_diagnosis()],
    }  # fmt: skip


def example_diagnosis() -> dict[str, Any]:
    """What limits the noisy DLG cell of the example: its defense, by a cell that the audit has anyway."""
    undefended, defended, *_ = (cell for cell in example_cells() if (cell.dataset, cell.attack) == ("brain", "dlg"))

    def measured(before: float, after: float) -> dict[str, float]:
        difference = after - before
        return {"before": before, "after": after, "difference": difference, "low": difference / 2, "high": difference}

    changes = [
        {
            "change": "no_defense", "cell": undefended.id, "status": "done", "reason": None, "oracle": "",
            "victims": 6, "images": 6, "success": measured(0, 1), "psnr": measured(18, 36), "ssim": measured(0.5, 0.9),
        },
        {"change": "labels_given", "cell": "none", "status": "refused", "reason": HOSTILE, "oracle": "labels"},
    ]  # fmt: skip
    return {
        "cell": defended.id, "verdict": "limited", "limit": "no_defense", "label_accuracy": 1.0,
        "notes": [{"text": f"noise {HOSTILE}", "cases": 6}], "stop_reasons": [{"text": "budget", "cases": 6}],
        "changes": changes,
    }  # fmt: skip


@pytest.fixture
def make_audit(tmp_path: Path) -> Callable[..., Path]:
    """Writes a fake output folder below the test's own folder: `make_audit([make_spec()], victims=2, summary={})`."""

    def make(cells: list[CellSpec], **options: Any) -> Path:
        return write_audit(tmp_path / "audit", cells, **options)

    return make


@pytest.fixture
def make_spec() -> Callable[..., CellSpec]:
    """What a fake audit says about one cell."""
    return CellSpec


@pytest.fixture
def hostile() -> str:
    """A name that must appear as text and nothing else."""
    return HOSTILE


@pytest.fixture(scope="session")
def example_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished audit with two data sets, defenses, an oracle, failures, a refused cell and hostile texts."""
    folder = tmp_path_factory.mktemp("example") / "audit"
    return write_audit(folder, example_cells(), summary=example_summary(), spec_text=f"name: {HOSTILE}\nseed: 0\n")

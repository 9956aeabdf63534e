"""The result files of an output folder: `results.csv`, `cells.csv`, `summary.json`, written from the store."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from medpfl.audit.diagnosis import is_extra
from medpfl.audit.effects import diagnosis
from medpfl.audit.entries import AXES
from medpfl.audit.entry_parsing import DATA_PATHS
from medpfl.audit.frontier import as_plain, frontiers
from medpfl.audit.guarantees import GUARANTEE_COLUMNS
from medpfl.audit.limits import all_satisfy
from medpfl.audit.prices import Frontier
from medpfl.audit.spec import Spec
from medpfl.audit.store import SCHEMA, Store
from medpfl.audit.utility_results import utility_columns, utility_summary
from medpfl.core.files import write_atomically
from medpfl.core.version import __version__
from medpfl.federation.guarding import LEVELS
from medpfl.metrics.cells import summarize_cell, supplement_cell
from medpfl.metrics.gains import gain_intervals
from medpfl.metrics.recovery import recovery_rates

RESULT_COLUMNS = (
    "case", "cell", "seed", *AXES, "oracle", "adaptive", "victim", "client", "position", "item", "status", "reason",
    "psnr", "ssim", "mse", "success", "label", "label_inferred", "label_correct", "legacy_ssim", "legacy_mse",
    "candidate", "candidates", "objective", "gradient_evaluations", "seconds", "stop_reason", "truth_image",
    "reconstruction_image", "mask_dice", "truth_mask", "reconstruction_mask", "notes", "verdict", "verdict_reason", "others_withheld", "client_inferred", "diagnosis_of", "change",
    *(f"null_{name}_{metric}" for name in ("class_mean", "nearest", "noise") for metric in ("psnr", "ssim", "mse")),
    "bytes_sent", "schema",
)  # fmt: skip
CELL_COLUMNS = (
    "cell", *(name for axis in AXES for name in (axis, f"{axis}_params")), "oracle", "adaptive", "status", "reason",
    "victims", "images", "done", "failed", "blocked", "complete", "asr", "asr_low", "asr_high",
    *(f"{name}_{part}" for name in ("psnr", "ssim", "mse") for part in ("mean", "low", "high", "median")),
    *(f"null_{name}_{metric}" for name in ("class_mean", "nearest", "noise") for metric in ("psnr", "ssim", "asr")),
    "gain_psnr", "gain_ssim", "utility_balanced_accuracy", "utility_balanced_accuracy_low",
    "utility_balanced_accuracy_high", "utility_auc", "utility_auc_low", "utility_auc_high",
    "label_accuracy", "mask_dice_mean", "legacy_asr", "legacy_ssim_mean", "legacy_mse_mean", "diagnosis_of", "change",
    "recovered", "recovered_low", "recovered_high", "verdicts",
    *(f"null_{name}_recovered" for name in ("class_mean", "nearest", "noise")),
    *GUARANTEE_COLUMNS,
    "gain_psnr_low", "gain_psnr_high", "gain_ssim_low", "gain_ssim_high", "bytes_sent",
    "schema",
)  # fmt: skip


@dataclass(frozen=True)
class Tables:
    """What was written: the rows of `cells.csv` for the cells of the grid, and what the diagnosis says of them."""

    cells: tuple[dict[str, Any], ...]
    diagnosis: tuple[dict[str, Any], ...]
    utility: Mapping[str, Any] | None = None
    frontiers: tuple[Frontier, ...] = ()


def write_tables(store: Store, spec: Spec) -> Tables:
    """Writes both tables and the summary atomically.

    Cells that exist for a diagnosis only stand in both tables, marked in the columns `diagnosis_of` (the cells that
    they diagnose) and `change` (what was changed in each of them); the summary's counts and limit leave them out.
    """
    changes: list[dict[str, str]] = store.get("changes") or []
    marked = marks(changes)
    rows = [{**row, **marked.get(row["cell"], {})} for row in store.results()]
    frame = pd.DataFrame(rows, columns=RESULT_COLUMNS) if rows else pd.DataFrame(columns=list(RESULT_COLUMNS))
    write_atomically(store.folder / "results.csv", csv_bytes(rows, RESULT_COLUMNS))
    guarantees = (store.get("guarantees") or {}).get("cells", {})
    measured = utility_summary(store, spec)
    prices = utility_columns(measured)
    cells = [
        {
            **row,
            **guarantees.get(row["cell"], {}),
            **prices.get(row["cell"], {}),
            **marked.get(row["cell"], {}),
        }
        for row in _cell_rows(store, spec, frame)
    ]
    write_atomically(store.folder / "cells.csv", csv_bytes(cells, CELL_COLUMNS))
    own = [cell for cell in cells if not is_extra(cell["cell"])]
    found = diagnosis(changes, {cell["cell"]: cell for cell in cells}, frame) if changes else []
    priced = frontiers(own, measured, spec.limit)
    summary = {
        **_summary(store, spec, own, rows, measured),
        "diagnosis": found,
        "utility": measured,
        "frontiers": [as_plain(one) for one in priced],
    }
    write_atomically(store.folder / "summary.json", json.dumps(summary, indent=2).encode())
    return Tables(tuple(own), tuple(found), measured, priced)


def marks(changes: Sequence[Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """The columns of the diagnosis, by the id of a cell that exists for it only."""
    found: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(change["changed"] for change in changes if is_extra(change["changed"])):
        same = [change for change in changes if change["changed"] == name]
        found[name] = {
            "diagnosis_of": ";".join(change["cell"] for change in same),
            "change": ";".join(change["change"] for change in same),
        }
    return found


def csv_bytes(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    """A table as CSV, stamped with the schema."""
    stamped = [{**row, "schema": SCHEMA} for row in rows]
    table = pd.DataFrame(
        [{column: _text(row.get(column)) for column in columns} for row in stamped],
        columns=list(columns),
    )
    return bytes(table.to_csv(index=False, lineterminator="\n").encode())


def _text(value: Any) -> str:
    """A value as the tables write it: booleans true / false, missing empty, numbers in full precision."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | dict):
        return json.dumps(value)
    return str(value)


def _cell_rows(store: Store, spec: Spec, frame: pd.DataFrame) -> list[dict[str, Any]]:
    groups = dict(list(frame.groupby("cell"))) if len(frame) else {}
    victims = {entry.id: entry.settings.victims * len(spec.seeds) for entry in spec.data}
    found = []
    for cell in sorted(store.cells(), key=lambda stored: stored.cell):
        row: dict[str, Any] = {"cell": cell.cell, **cell.columns}
        rows = groups.get(cell.cell)
        if cell.refusal is not None:
            row |= {"status": "refused", "reason": cell.refusal}
        else:
            rows = rows if rows is not None else frame.iloc[:0]
            row |= summarize_cell(rows, threshold=spec.success_threshold, seed=0)
            row |= supplement_cell(rows, threshold=spec.success_threshold)
            row |= recovery_rates(rows, seed=0)
            row |= gain_intervals(rows, seed=0) | {"verdicts": verdicts(rows), "bytes_sent": mean_bytes(rows)}
            expected = victims.get(str(cell.columns["dataset"]), 0)
            if is_extra(cell.cell) and spec.diagnose is not None:
                expected = min(expected, spec.diagnose.victims * len(spec.seeds))
            row["status"] = "done" if row["victims"] == expected else "partial"
            row["complete"] = bool(row["complete"]) and row["status"] == "done"
        found.append(row)
    return found


def mean_bytes(rows: pd.DataFrame) -> float | None:
    """What a client sends, in bytes, on average over victims; None where nothing was sent. `rows` as in `results.csv`.

    >>> mean_bytes(pd.DataFrame({"seed": 0, "victim": [0, 0, 1], "bytes_sent": [10, 10, 20]}))
    15.0
    """
    sent = rows.dropna(subset=["bytes_sent"]).drop_duplicates(["seed", "victim"])["bytes_sent"]
    return float(sent.astype(float).mean()) if len(sent) else None


def verdicts(rows: pd.DataFrame) -> str | None:
    """How many clients' guards found what, the worst first; None without a guard. `rows` as in `results.csv`.

    >>> rows = pd.DataFrame({"seed": 0, "victim": [0, 0, 1], "client": 0, "verdict": ["crafted", "crafted", "passed"]})
    >>> verdicts(rows)
    '1 crafted, 1 passed'
    """
    judged = rows.dropna(subset=["verdict"]).drop_duplicates(["seed", "victim", "client"])
    counts = judged["verdict"].value_counts()
    return ", ".join(f"{counts[level]} {level}" for level in reversed(LEVELS) if level in counts) or None


def _summary(
    store: Store,
    spec: Spec,
    cells: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    utility: Mapping[str, Any] | None,
) -> dict[str, Any]:
    counts = store.counts(lambda cell: not is_extra(cell))
    everything = store.counts()
    measured = utility is None or utility["done"] + utility["failed"] == utility["runs"]
    refused = sum(cell["status"] == "refused" for cell in cells)
    finished = everything["done"] + everything["failed"] + everything["blocked"] == everything["cases"] and measured
    limit = None
    if spec.limit is not None:
        limit = {"text": str(spec.limit), "holds": all_satisfy(spec.limit, cells)}
    seconds = sum(row["seconds"] or 0.0 for row in rows if row["position"] == 0)
    context: dict[str, Any] = store.get("context") or {}
    return {
        "schema": SCHEMA,
        "name": spec.name,
        "created": store.get("created"),
        "finished": finished,
        "threshold": spec.success_threshold,
        "limit": limit,
        "counts": {
            "cells": len(cells),
            "refused": refused,
            **counts,
            "diagnosis_cases": everything["cases"] - counts["cases"],
            "diagnosis_failed": everything["failed"] - counts["failed"],
        },
        "seconds": seconds,
        **context,
        "versions": versions(),
        "hardware": hardware(),
        "plan": store.get("plan"),
    }


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    packages = ("torch", "numpy", "scipy", "pydicom", "nibabel", "pillow")
    return {"medpfl": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}


def hardware() -> dict[str, Any]:
    """What the audit ran on."""
    return {
        "system": platform.system(),
        "processor": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def spec_as_run(spec: Spec, folder: Path) -> bytes:
    """`spec.yaml`: the spec with paths relative to the output folder, and what it ran on under `environment`.

    `environment` also has the schema of the folder's files, and where the code of model factories lies.
    """
    import os

    import yaml

    plain = json.loads(json.dumps(dict(spec.plain)))
    for entry in plain.get("data", []):
        for key in DATA_PATHS if isinstance(entry, dict) else ():
            path = entry.get(key)
            if not isinstance(path, str) or path.startswith("package:"):
                continue
            entry[key] = os.path.relpath((spec.base / Path(path).expanduser()).resolve(), folder.resolve())
    for entry, parsed in zip(plain.get("models", []), spec.models, strict=False):
        if isinstance(entry, dict) and parsed.checkpoint is not None:
            entry["state"] = os.path.relpath(parsed.checkpoint.resolve(), folder.resolve())
    plain["environment"] = {"schema": SCHEMA, "versions": versions(), "hardware": hardware()}
    packages = {entry.source.partition(":")[0].partition(".")[0] for entry in spec.models if ":" in entry.source}
    holding = [place for place in spec.factory_folders if any(_holds(place, package) for package in packages)]
    if holding:
        plain["environment"]["factory_folders"] = [
            os.path.relpath(place.resolve(), folder.resolve()) for place in holding
        ]
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).encode()


def _holds(folder: Path, package: str) -> bool:
    return (folder / f"{package}.py").is_file() or (folder / package).is_dir()

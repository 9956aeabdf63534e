"""What utility runs found: columns of `cells.csv`, and the entry `utility` of `summary.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medpfl.audit.spec import Spec
from medpfl.audit.store import Store
from medpfl.audit.utility import Measurement, UtilityRun, unique_runs
from medpfl.metrics.statistics import Interval
from medpfl.metrics.utility import UTILITY, over_seeds

Found = Mapping[str, Any]
"""What the store has of a run."""


def pending_utility(store: Store, measured: Sequence[Measurement]) -> list[UtilityRun]:
    """Runs that have no result yet."""
    tried = store.utility()
    return [run for run in unique_runs(measured) if run.key not in tried]


def utility_columns(summary: Mapping[str, Any] | None) -> dict[str, dict[str, float | None]]:
    """Columns of `cells.csv` by the id of a cell, from the entry of `summary.json`."""
    found: dict[str, dict[str, float | None]] = {}
    for entry in summary["settings"] if summary is not None else ():
        for cell in entry["cells"]:
            found[cell] = {
                f"utility_{name}{end}": entry["defended"][name][part]
                for name in UTILITY
                for part, end in (("mean", ""), ("low", "_low"), ("high", "_high"))
            }
    return found


def utility_summary(store: Store, spec: Spec) -> dict[str, Any] | None:
    """The entry `utility` of `summary.json`; None where utility is not measured.

    Under `settings` for every data, model, recipe, channel and defense: the federation under that defense, the same
    without, the mean over clients who train alone, and guessing the most frequent class; `lost` is what the defense
    costs, paired over runs and held-out images. Numbers are None until all runs of a kind are there.
    """
    planned: list[dict[str, Any]] | None = store.get("measurements")
    if spec.utility is None or planned is None:
        return None
    tried = store.utility()
    settings = [_setting(entry, tried) for entry in planned]
    keys = {run["key"] for entry in planned for kind in ("defended", "undefended", "alone") for run in entry[kind]}
    failed = {key: tried[key]["reason"] for key in sorted(keys) if tried.get(key, {}).get("status") == "failed"}
    return {
        "how": store.get("utility"),
        "runs": len(keys),
        "done": sum(tried.get(key, {}).get("status") == "done" for key in keys),
        "failed": len(failed),
        "reasons": list(dict.fromkeys(failed.values())),
        "settings": settings,
    }


def _setting(entry: Mapping[str, Any], tried: Mapping[str, Found]) -> dict[str, Any]:
    kinds = {kind: [tried.get(run["key"]) for run in entry[kind]] for kind in ("defended", "undefended")}
    alone = _alone(entry["alone"], tried)
    classes = next((len(run["recalls"]) for run in kinds["undefended"] if run is not None and _done(run)), 0)
    described: dict[str, Any] = {
        **entry["setting"],
        "cells": list(entry["cells"]),
        "recipe_as_trained": entry["recipe"],
        "clients": list(entry["clients"]),
        "held_out": entry["held_out"],
        "notes": list(entry["notes"]),
        "refusal": entry["refusal"],
        "defended": _numbers(kinds["defended"]),
        "undefended": _numbers(kinds["undefended"]),
        "alone": _numbers(alone),
        "majority": {"balanced_accuracy": 1.0 / classes if classes else None, "auc": 0.5, "share": entry["majority"]},
        "lost": _lost(kinds["defended"], kinds["undefended"]),
        "recalls": _recalls(kinds["defended"]),
        "broken_down": sum(not run["finite"] for run in _complete(kinds["defended"])),
    }
    return described


def _done(run: Found | None) -> bool:
    return run is not None and run["status"] == "done"


def _complete(runs: Sequence[Found | None]) -> list[Found]:
    """The runs if all are there, else none."""
    there = [run for run in runs if run is not None and _done(run)]
    return there if len(there) == len(runs) else []


def _numbers(runs: Sequence[Found | None]) -> dict[str, dict[str, float | None]]:
    there = _complete(runs)
    return {
        name: _plain(over_seeds([run["values"][name] for run in there], [run["resampled"][name] for run in there]))
        for name in UTILITY
    }


def _lost(defended: Sequence[Found | None], undefended: Sequence[Found | None]) -> dict[str, dict[str, float | None]]:
    """Without minus with the defense, run by run, on the same resamples of the same images."""
    pairs = list(zip(_complete(undefended), _complete(defended), strict=False))
    return {
        name: _plain(
            over_seeds(
                [before["values"][name] - after["values"][name] for before, after in pairs],
                [np.subtract(before["resampled"][name], after["resampled"][name]) for before, after in pairs],
            )
        )
        for name in UTILITY
    }


def _alone(runs: Sequence[Mapping[str, Any]], tried: Mapping[str, Found]) -> list[Found | None]:
    """For each seed the mean over its clients; None where one is missing."""
    seeds: dict[int, list[Found | None]] = {}
    for run in runs:
        seeds.setdefault(run["seed"], []).append(tried.get(run["key"]))
    means: list[Found | None] = []
    for clients in seeds.values():
        there = _complete(clients)
        means.append(_mean(there) if there else None)
    return means


def _mean(runs: Sequence[Found]) -> Found:
    return {
        "status": "done",
        "values": {name: float(np.mean([run["values"][name] for run in runs])) for name in UTILITY},
        "resampled": {name: np.mean([run["resampled"][name] for run in runs], axis=0).tolist() for name in UTILITY},
    }


def _recalls(runs: Sequence[Found | None]) -> list[float | None]:
    """The share of each class that is found, mean over runs."""
    there = _complete(runs)
    if not there:
        return []
    columns = zip(*(run["recalls"] for run in there), strict=True)
    return [None if None in column else float(np.mean(column)) for column in columns]


def _plain(interval: Interval) -> dict[str, float | None]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}

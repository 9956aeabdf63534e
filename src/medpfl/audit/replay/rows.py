"""Result rows of one replayed update: scored against the truth of those who own it, or shown without any score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medpfl.audit.images import write_image
from medpfl.audit.plan import case_id
from medpfl.audit.replay.settings import Replay
from medpfl.audit.rows import Row
from medpfl.core.domain import Failure, Reconstruction
from medpfl.core.seeding import generator
from medpfl.federation.recording import Recorded
from medpfl.metrics.nulls import null_baselines
from medpfl.metrics.scoring import as_label, score
from medpfl.metrics.truth import GroundTruth


@dataclass(frozen=True)
class Place:
    """Where a case stands: its cell's columns, its number within the cell, and the update itself."""

    columns: Mapping[str, Any]
    victim: int
    update: Recorded


def replayed_rows(
    replay: Replay,
    place: Place,
    outcome: Reconstruction | Failure,
    truth: GroundTruth | None,
    seconds: float,
    out: Path,
    convention: str,
) -> list[Row]:
    """One row per private image where the truth is known, else one per image that came back (one without, if none)."""
    shared = {
        **{axis: place.columns[axis] for axis in place.columns},
        "case": case_id(str(place.columns["cell"]), replay.seed, place.victim),
        "seed": replay.seed,
        "victim": place.victim,
        "client": 0,
        "seconds": seconds,
    }
    if isinstance(outcome, Failure):
        items = [None] if truth is None else truth.items
        return [
            {**shared, "position": index, "item": item or _item(place), "status": "failed", "reason": outcome.reason,
             "success": None if truth is None else False}
            for index, item in enumerate(items)
        ]  # fmt: skip
    found = {
        **shared,
        "status": "done",
        "reason": None,
        "objective": None if outcome.objective != outcome.objective else outcome.objective,
        "gradient_evaluations": outcome.gradient_evaluations,
        "stop_reason": outcome.stop_reason,
        "notes": "; ".join(outcome.notes),
        "candidates": len(outcome.images),
        "trace": [list(point) for point in outcome.trace],
    }
    if truth is None:
        return [{**found, **_shown(outcome, place, index, out)} for index in range(max(1, len(outcome.images)))]
    return [{**found, **one} for one in _scored(replay, place, outcome, truth, out, convention)]


def _item(place: Place) -> str:
    return f"round {place.update.round}, client {place.update.client}"


def _paths(place: Place, index: int) -> tuple[Path, Path]:
    stem = f"v{place.victim:04d}-p{index:03d}.png"
    cell = str(place.columns["cell"]).split("/")
    return Path("images", "truth", str(place.columns["model"]), stem), Path("images", *cell, stem)


def _shown(outcome: Reconstruction, place: Place, index: int, out: Path) -> Row:
    """A reconstruction as it came back, without any score."""
    row: Row = {"position": index, "item": _item(place)}
    if index >= len(outcome.images):
        return row
    _, path = _paths(place, index)
    write_image(out / path, outcome.images[index])
    label = None if outcome.labels is None else as_label(_hard(outcome.labels[index]))
    return {**row, "candidate": index, "label_inferred": label, "reconstruction_image": path.as_posix()}


def _hard(label: Tensor) -> Tensor:
    return label.argmax() if label.ndim and label.is_floating_point() and float(label.sum()) <= 1.001 else label


def _scored(
    replay: Replay, place: Place, outcome: Reconstruction, truth: GroundTruth, out: Path, convention: str
) -> list[Row]:
    nulls = _nulls(replay, place, truth)
    fallback = torch.full(truth.images.shape[1:], 0.5)
    if replay.auxiliary is not None:
        fallback = replay.auxiliary.images.mean(dim=0)
    rows: list[Row] = []
    for one in score(outcome, truth, fallback=fallback, threshold=replay.threshold, convention=convention):
        truth_path, path = _paths(place, one.position)
        write_image(out / truth_path, truth.images[one.position])
        write_image(out / path, one.image)
        rows.append(
            {
                "position": one.position,
                "item": one.item,
                **{name: getattr(one, name) for name in (
                    "psnr", "ssim", "mse", "success", "label", "label_inferred", "label_correct", "candidate"
                )},
                **{name: None if (value := getattr(one, name)) != value else value
                   for name in ("legacy_ssim", "legacy_mse")},
                "truth_image": truth_path.as_posix(),
                "reconstruction_image": path.as_posix(),
                **{f"null_{name}_{metric}": values[one.position]
                   for name, scores in nulls.items() for metric, values in scores.items()},
            }
        )  # fmt: skip
    return rows


def _nulls(replay: Replay, place: Place, truth: GroundTruth) -> dict[str, dict[str, list[float]]]:
    """Null baselines from the pool and the other clients' images."""
    assert replay.truths is not None  # the caller has the truth
    others = replay.truths.others(place.update)
    parts = [] if others is None else [others]
    if replay.nulls is not None:
        same = replay.nulls.targets.shape[1:] == truth.labels.shape[1:]
        targets = (
            replay.nulls.targets
            if same
            else truth.labels.new_zeros((len(replay.nulls.images), *truth.labels.shape[1:]))
        )
        parts.append((replay.nulls.images, targets))
    images = torch.cat([images for images, _ in parts]) if parts else truth.images[:0]
    targets = torch.cat([labels.to(truth.labels.dtype) for _, labels in parts]) if parts else truth.labels[:0]
    stream = generator("null", replay.seed, place.update.round, place.update.client)
    return {
        name: {"psnr": scores.psnr.tolist(), "ssim": scores.ssim.tolist(), "mse": scores.mse.tolist()}
        for name, scores in null_baselines(truth, images, targets, stream).items()
    }

"""Computes the cases of one chunk: client step, observation, attack, score."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from medpfl.attacks.crafted import CraftedAttack
from medpfl.audit.grid import Cell
from medpfl.audit.images import write_image, write_mask
from medpfl.audit.materials import Materials
from medpfl.audit.plan import Chunk, case_id
from medpfl.audit.rounds import broadcast, client_round, known_defense, known_recipe
from medpfl.core.devices import CPU, moved
from medpfl.core.domain import (
    Failure,
    GlobalModel,
    Knowledge,
    Observation,
    Reconstruction,
    Update,
)
from medpfl.core.functional import is_finite
from medpfl.core.seeding import generator
from medpfl.core.session import Session
from medpfl.metrics.nulls import null_baselines
from medpfl.metrics.scoring import ImageScore, as_label, score
from medpfl.metrics.truth import GroundTruth
from medpfl.models import Normalization
from medpfl.models.batch_norm import batch_norm_layers, forward_with_statistics

Row = dict[str, Any]
Nulls = Mapping[str, Mapping[str, list[float]]]
"""Null baseline -> metric -> value per private image."""


def compute(materials: Materials, cell: Cell, chunk: Chunk, out: Path, session: Session) -> list[Row]:
    """Result rows of all cases of a chunk, one per private image; images are written below `out`."""
    broadcast(materials, cell, chunk.seed, chunk.victims[0], session)  # training or crafting a model is no case's time
    started = time.perf_counter()
    truths = {victim: materials.truth(cell, chunk.seed, victim) for victim in chunk.victims}
    observations: dict[int, Observation] = {}
    failures: dict[int, Failure] = {}
    for victim in truths:
        update = client_round(materials, cell, chunk.seed, victim)
        if all(is_finite(tensor) for tensor in update.trainable.values()):
            observations[victim] = _observe(materials, cell, chunk.seed, victim, update)
        else:
            failures[victim] = Failure(
                "the client's update is not finite: its own training diverged, nothing was attacked"
            )
    outcomes: dict[int, Reconstruction | Failure] = dict(failures)
    if observations:
        generators = [generator("attack", chunk.seed, case_id(cell.stream, chunk.seed, v)) for v in observations]
        results = cell.attack.attack.reconstruct(list(observations.values()), generators, session)
        outcomes.update(zip(observations, moved(results, CPU), strict=True))
    seconds = (time.perf_counter() - started) / len(chunk.victims)
    rows: list[Row] = []
    for victim in chunk.victims:
        rows += _case_rows(materials, cell, chunk.seed, victim, truths[victim], outcomes[victim], seconds, out)
    return rows


def failed_rows(materials: Materials, cell: Cell, chunk: Chunk, reason: str) -> list[Row]:
    """Rows of cases that could not be computed at all."""
    rows: list[Row] = []
    for victim in chunk.victims:
        truth = materials.truth(cell, chunk.seed, victim)
        nulls = _nulls(materials, cell, chunk.seed, victim, truth)
        rows += _failed(cell, chunk.seed, victim, truth, reason, None, nulls)
    return rows


def _observe(materials: Materials, cell: Cell, seed: int, victim: int, update: Update) -> Observation:
    """What the adversary sees; granted knowledge that the attack does not read is left out."""
    sent = broadcast(materials, cell, seed, victim)
    model = sent.model(0)
    read, truth = cell.read, materials.everybody(cell, seed, victim)
    images = moved(truth.images, materials.device)
    knowledge = Knowledge(
        labels=truth.labels if "labels" in read else None,
        masks=truth.masks if "masks" in read else None,
        logits=model.forward(images)[0].detach() if "logits" in read else None,
        batch_norm_statistics=_batch_norm_statistics(model, images, cell.recipe.recipe.batch_norm)
        if "batch_norm_statistics" in read
        else None,
        auxiliary=materials.auxiliary(cell, seed) if "auxiliary" in read else None,
        defense=known_defense(cell),
    )
    return Observation(
        model=model,
        update=update,
        recipe=sent.recipe or known_recipe(cell),
        threat_model=cell.threat_model.name,
        knowledge=moved(knowledge, materials.device),
        clients=cell.channel.channel.client_count,
        broadcast=sent if isinstance(cell.attack.attack, CraftedAttack) else None,
    )


def _batch_norm_statistics(model: GlobalModel, images: Tensor, mode: Literal["train", "eval"]) -> dict[str, Tensor]:
    """Per batch norm layer `LAYER.mean` and `LAYER.variance` (biased) of what it receives for the private images."""
    with torch.no_grad():
        _, found = forward_with_statistics(model, images, batch_norm_layers(model), batch_norm=mode)
    return {
        f"{path}.{name}": tensor
        for path, both in found.items()
        for name, tensor in zip(("mean", "variance"), both, strict=True)
    }


def _case_rows(
    materials: Materials,
    cell: Cell,
    seed: int,
    victim: int,
    truth: GroundTruth,
    outcome: Reconstruction | Failure,
    seconds: float,
    out: Path,
) -> list[Row]:
    if isinstance(outcome, Failure):
        return _failed(cell, seed, victim, truth, outcome.reason, seconds, _nulls(materials, cell, seed, victim, truth))
    scores = score(
        outcome,
        truth,
        fallback=_fallback(materials, cell, seed),
        threshold=materials.spec.success_threshold,
        convention=cell.attack.attack.legacy_convention,
        normalization=_normalization(cell.model.normalize),
    )
    nulls = _nulls(materials, cell, seed, victim, truth)
    rows = []
    for image_score in scores:
        paths = _write_images(materials, cell, seed, victim, truth, image_score, out)
        rows.append(_row(cell, seed, victim, truth, outcome, image_score, nulls, seconds, paths))
    return rows


def _nulls(materials: Materials, cell: Cell, seed: int, victim: int, truth: GroundTruth) -> Nulls:
    images, targets = materials.null_images(cell, seed)
    found = null_baselines(truth, images, targets, generator("null", seed, cell.dataset.id, victim))
    return {
        name: {"psnr": scores.psnr.tolist(), "ssim": scores.ssim.tolist(), "mse": scores.mse.tolist()}
        for name, scores in found.items()
    }


def _null_columns(nulls: Nulls, position: int) -> Row:
    return {
        f"null_{name}_{metric}": values[position] for name, scores in nulls.items() for metric, values in scores.items()
    }


def _fallback(materials: Materials, cell: Cell, seed: int) -> Tensor:
    """What a victim's image is scored against when nothing came back for it."""
    auxiliary = materials.auxiliary(cell, seed)
    if auxiliary is not None and len(auxiliary.images):
        return auxiliary.images.mean(dim=0)
    shape = materials.dataset(cell.dataset).images.shape[1:]
    return torch.full(shape, 0.5)


def _normalization(normalize: Normalization | None) -> tuple[Tensor, Tensor] | None:
    if normalize is None:
        return None
    return torch.tensor(normalize.mean), torch.tensor(normalize.std)


def _write_images(
    materials: Materials, cell: Cell, seed: int, victim: int, truth: GroundTruth, image_score: ImageScore, out: Path
) -> dict[str, str]:
    client = truth.client(image_score.position)
    own = image_score.position - truth.clients.index(client) if client else image_score.position
    stem = f"s{seed}-v{victim:04d}{f'-c{client:03d}' if client else ''}-p{own:03d}"
    truth_path = Path("images", "truth", cell.dataset.id, f"{stem}.png")
    reconstruction_path = Path("images", *cell.id.split("/"), f"{stem}.png")
    if not (out / truth_path).with_suffix(".npz").exists():
        write_image(out / truth_path, truth.images[image_score.position])
    write_image(out / reconstruction_path, image_score.image)
    paths = {"truth_image": truth_path, "reconstruction_image": reconstruction_path}
    if truth.masks is not None:
        classes = len(materials.dataset(cell.dataset).mask_names)
        paths["truth_mask"] = truth_path.with_stem(f"{stem}-mask")
        if not (out / paths["truth_mask"]).with_suffix(".npz").exists():
            write_mask(out / paths["truth_mask"], truth.masks[image_score.position], classes)
        if image_score.mask is not None:
            paths["reconstruction_mask"] = reconstruction_path.with_stem(f"{stem}-mask")
            write_mask(out / paths["reconstruction_mask"], image_score.mask, classes)
    return {name: path.as_posix() for name, path in paths.items()}


def _identity(cell: Cell, seed: int, victim: int, truth: GroundTruth, position: int) -> Row:
    """The columns that a row has whatever became of the case."""
    return {
        "case": case_id(cell.id, seed, victim),
        "cell": cell.id,
        "seed": seed,
        **{axis: entry.id for axis, entry in cell.entries.items()},
        "oracle": cell.oracle,
        "adaptive": cell.adaptive,
        "victim": victim,
        "client": truth.client(position),
        "position": position,
        "item": truth.items[position],
    }


def _row(
    cell: Cell,
    seed: int,
    victim: int,
    truth: GroundTruth,
    outcome: Reconstruction,
    image_score: ImageScore,
    nulls: Nulls,
    seconds: float,
    paths: Mapping[str, str],
) -> Row:
    position = image_score.position
    row: Row = {
        **_identity(cell, seed, victim, truth, position),
        "status": "done",
        "reason": None,
        "psnr": image_score.psnr,
        "ssim": image_score.ssim,
        "mse": image_score.mse,
        "success": image_score.success,
        "label": image_score.label,
        "label_inferred": image_score.label_inferred,
        "label_correct": image_score.label_correct,
        "legacy_ssim": image_score.legacy_ssim,
        "legacy_mse": image_score.legacy_mse,
        "mask_dice": image_score.mask_dice,
        "candidate": image_score.candidate,
        "candidates": image_score.candidates,
        "objective": outcome.objective,
        "gradient_evaluations": outcome.gradient_evaluations,
        "seconds": seconds,
        "stop_reason": outcome.stop_reason,
        **paths,
        "notes": "; ".join(outcome.notes),
        "trace": [list(point) for point in outcome.trace],
    }
    row |= _null_columns(nulls, position)
    return {key: _finite(value) for key, value in row.items()}


def _failed(
    cell: Cell, seed: int, victim: int, truth: GroundTruth, reason: str, seconds: float | None, nulls: Nulls
) -> list[Row]:
    return [
        {
            **_identity(cell, seed, victim, truth, position),
            "status": "failed",
            "reason": reason,
            "success": False,
            "label": as_label(truth.labels[position]),
            "seconds": seconds,
            **_null_columns(nulls, position),
        }
        for position in range(len(truth.items))
    ]


def _finite(value: Any) -> Any:
    """Undefined legacy scores are missing values, not NaN, in JSON and CSV."""
    return None if isinstance(value, float) and value != value else value

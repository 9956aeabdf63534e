"""Result rows of one case, one per private image: what came back of it, or why nothing did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medpfl.audit.grid import Cell
from medpfl.audit.images import write_image, write_mask
from medpfl.audit.materials import Materials
from medpfl.audit.plan import case_id
from medpfl.core.domain import Failure, Reconstruction
from medpfl.core.mechanisms import Unchanged
from medpfl.core.seeding import generator
from medpfl.federation.guarding import worst
from medpfl.federation.rounds import RoundResult
from medpfl.federation.traffic import bytes_sent
from medpfl.metrics.nulls import null_baselines
from medpfl.metrics.scoring import ImageScore, as_label, score
from medpfl.metrics.truth import GroundTruth
from medpfl.models import Normalization

Row = dict[str, Any]
Outcome = Reconstruction | Failure | None
"""What an attack made of a round; None where no scored client sent anything."""

Nulls = Mapping[str, Mapping[str, list[float]]]
"""Null baseline -> metric -> value per private image."""


@dataclass(frozen=True)
class Case:
    """One victim's round with what was really held; `round` is None where it could not be played at all."""

    materials: Materials
    cell: Cell
    seed: int
    victim: int
    truth: GroundTruth
    round: RoundResult | None = None

    @cached_property
    def nulls(self) -> Nulls:
        """The null baselines of its images."""
        images, targets = self.materials.null_images(self.cell, self.seed)
        stream = generator("null", self.seed, self.cell.dataset.id, self.victim)
        return {
            name: {"psnr": scores.psnr.tolist(), "ssim": scores.ssim.tolist(), "mse": scores.mse.tolist()}
            for name, scores in null_baselines(self.truth, images, targets, stream).items()
        }

    def withheld(self, position: int) -> bool:
        """Whether the client that holds the image at that position sent nothing."""
        return self.round is not None and self.round.withheld(self.truth.client(position))

    @property
    def fallback(self) -> Tensor:
        """What a private image is scored against when nothing came back for it."""
        auxiliary = self.materials.auxiliary(self.cell, self.seed)
        if auxiliary is not None and len(auxiliary.images):
            return auxiliary.images.mean(dim=0)
        return torch.full(self.materials.dataset(self.cell.dataset).images.shape[1:], 0.5)


def case_rows(case: Case, outcome: Outcome, seconds: float | None, out: Path) -> list[Row]:
    """One row per private image; images are written below `out`. seconds: what the case took, None if unknown."""
    sent = [position for position in range(len(case.truth.items)) if not case.withheld(position)]
    rows = {
        position: _blocked(case, position, seconds) for position in range(len(case.truth.items)) if position not in sent
    }
    if isinstance(outcome, Failure):
        rows |= {position: _failed(case, position, outcome.reason, seconds) for position in sent}
    elif outcome is not None:
        for image_score in _scores(case, outcome, sent):
            paths = _write_images(case, image_score, out)
            rows[image_score.position] = _done(case, outcome, image_score, seconds, paths)
    return [rows[position] for position in sorted(rows)]


def held_by(truth: GroundTruth) -> tuple[int, ...]:
    """The numbers of the clients whose images these are."""
    return tuple(dict.fromkeys(truth.client(position) for position in range(len(truth.items))))


def _scores(case: Case, outcome: Reconstruction, sent: list[int]) -> list[ImageScore]:
    """Scores of the images of clients that sent something, by their position among all."""
    scores = score(
        outcome,
        case.truth.part(sent),
        fallback=case.fallback,
        threshold=case.materials.spec.success_threshold,
        convention=case.cell.attack.attack.legacy_convention,
        normalization=_normalization(case.cell.model.normalize),
    )
    return [replace(found, position=sent[found.position]) for found in scores]


def _normalization(normalize: Normalization | None) -> tuple[Tensor, Tensor] | None:
    if normalize is None:
        return None
    return torch.tensor(normalize.mean), torch.tensor(normalize.std)


def _write_images(case: Case, image_score: ImageScore, out: Path) -> dict[str, str]:
    truth, dataset = case.truth, case.cell.dataset
    client = truth.client(image_score.position)
    own = image_score.position - truth.clients.index(client) if client else image_score.position
    stem = f"s{case.seed}-v{case.victim:04d}{f'-c{client:03d}' if client else ''}-p{own:03d}"
    truth_path = Path("images", "truth", dataset.id, f"{stem}.png")
    reconstruction_path = Path("images", *case.cell.id.split("/"), f"{stem}.png")
    if not (out / truth_path).with_suffix(".npz").exists():
        write_image(out / truth_path, truth.images[image_score.position])
    write_image(out / reconstruction_path, image_score.image)
    paths = {"truth_image": truth_path, "reconstruction_image": reconstruction_path}
    if truth.masks is not None:
        classes = len(case.materials.dataset(dataset).mask_names)
        paths["truth_mask"] = truth_path.with_stem(f"{stem}-mask")
        if not (out / paths["truth_mask"]).with_suffix(".npz").exists():
            write_mask(out / paths["truth_mask"], truth.masks[image_score.position], classes)
        if image_score.mask is not None:
            paths["reconstruction_mask"] = reconstruction_path.with_stem(f"{stem}-mask")
            write_mask(out / paths["reconstruction_mask"], image_score.mask, classes)
    return {name: path.as_posix() for name, path in paths.items()}


def _identity(case: Case, position: int, seconds: float | None) -> Row:
    """The columns that a row has whatever became of the case."""
    cell = case.cell
    return {
        "case": case_id(cell.id, case.seed, case.victim),
        "cell": cell.id,
        "seed": case.seed,
        **{axis: entry.id for axis, entry in cell.entries.items()},
        "oracle": cell.oracle,
        "adaptive": cell.adaptive,
        "victim": case.victim,
        "client": case.truth.client(position),
        "position": position,
        "item": case.truth.items[position],
        "label": as_label(case.truth.labels[position]),
        "seconds": seconds,
        "bytes_sent": _bytes_sent(case),
        **_verdict(case, position),
        **{
            f"null_{name}_{metric}": values[position]
            for name, scores in case.nulls.items()
            for metric, values in scores.items()
        },
    }


def _bytes_sent(case: Case) -> int | None:
    """What one client of the round sends, in bytes; sums of several clients are of numbers that no defense shortens."""
    if case.round is None or case.round.update is None:
        return None
    summed = case.cell.channel.channel.client_count > 1
    return bytes_sent(case.round.update, Unchanged() if summed else case.cell.defense.defense.mechanism())


def _verdict(case: Case, position: int) -> Row:
    """What the client's guard found, and how many of the other clients withheld theirs."""
    if case.round is None or not any(case.round.verdicts):
        return {}
    client = case.truth.client(position)
    found = case.round.verdicts[client]
    others = [number for number in range(len(case.round.verdicts)) if number != client]
    return {
        "verdict": worst(found),
        "verdict_reason": "; ".join(str(verdict) for verdict in found),
        "others_withheld": sum(map(case.round.withheld, others)),
    }


def _done(
    case: Case, outcome: Reconstruction, image_score: ImageScore, seconds: float | None, paths: Mapping[str, str]
) -> Row:
    row: Row = {
        **_identity(case, image_score.position, seconds),
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
        "client_inferred": _client_inferred(outcome, image_score),
        "objective": outcome.objective,
        "gradient_evaluations": outcome.gradient_evaluations,
        "stop_reason": outcome.stop_reason,
        **paths,
        "notes": "; ".join(outcome.notes),
        "trace": [list(point) for point in outcome.trace],
    }
    return {key: _finite(value) for key, value in row.items()}


def _client_inferred(outcome: Reconstruction, image_score: ImageScore) -> int | None:
    """The client, or the group of one client's images, to which the attack attributes what came back."""
    if outcome.clients is None or image_score.candidate is None:
        return None
    return int(outcome.clients[image_score.candidate])


def _failed(case: Case, position: int, reason: str, seconds: float | None) -> Row:
    return {**_identity(case, position, seconds), "status": "failed", "reason": reason, "success": False}


def _blocked(case: Case, position: int, seconds: float | None) -> Row:
    """A row of a client whose guard withheld its update."""
    assert case.round is not None  # nothing is withheld in a round that was not played
    withholding = [verdict for verdict in case.round.verdicts[case.truth.client(position)] if verdict.withholds]
    reason = f"withheld by {' and '.join(verdict.guard for verdict in withholding)}: {worst(withholding)}"
    return {**_identity(case, position, seconds), "status": "blocked", "reason": reason, "success": False}


def _finite(value: Any) -> Any:
    """Undefined legacy scores are missing values, not NaN, in JSON and CSV."""
    return None if isinstance(value, float) and value != value else value

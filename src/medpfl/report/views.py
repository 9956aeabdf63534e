"""What the report knows about an audit: frozen views of the files in an output folder. None means missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from medpfl.audit.prices import Frontier
from medpfl.metrics.cells import supplement_cell
from medpfl.report.guaranteed import Guaranteed

AXES = ("dataset", "model", "recipe", "threat_model", "channel", "defense", "guard", "attack")
"""The axes of the grid, in the order of the result tables."""

NULLS = ("nearest", "class_mean", "noise")
"""The null baselines, in the order in which the report shows them."""

NOTHING_THERE = frozenset({"", "none"})
"""Ids of an axis entry that stand for its absence."""


@dataclass(frozen=True)
class Measured:
    """A mean over the images of a cell, with the interval that bootstraps its victims."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Null:
    """What handing over a picture that owes nothing to the update would have scored."""

    name: str
    psnr: float | None = None
    ssim: float | None = None
    asr: float | None = None
    recovered: float | None = None


@dataclass(frozen=True)
class ImageResult:
    """One private image: a row of `results.csv`. `null_ssim` and `null_psnr` map null baselines to this image's score, if stored.

    `truth_mask` and `reconstruction_mask` are pictures of a segmentation model's masks, empty where there are none.

    `fallback` says that nothing came back for it and the adversary's best guess without an update was scored.
    `verdict` and `verdict_reason` are what its client's guard found, empty without one.
    """

    case: str
    cell: str
    seed: str
    victim: str
    client: str
    position: int
    item: str
    status: str
    reason: str
    success: bool | None = None
    psnr: float | None = None
    ssim: float | None = None
    mse: float | None = None
    legacy_ssim: float | None = None
    legacy_mse: float | None = None
    label: str = ""
    label_correct: bool | None = None
    evaluations: float | None = None
    seconds: float | None = None
    stop_reason: str = ""
    objective: float | None = None
    truth_image: str = ""
    reconstruction_image: str = ""
    truth_mask: str = ""
    reconstruction_mask: str = ""
    mask_dice: float | None = None
    fallback: bool = False
    null_ssim: Mapping[str, float] = field(default_factory=dict)
    null_psnr: Mapping[str, float] = field(default_factory=dict)
    verdict: str = ""
    verdict_reason: str = ""
    others_withheld: float | None = None
    told: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether an attack finished on this image's case."""
        return self.status == "done"

    @property
    def private_image(self) -> tuple[str, str, str, int]:
        """What two cells that met the same private image have in common."""
        return self.seed, self.victim, self.client, self.position


@dataclass(frozen=True)
class Cell:
    """One combination of the grid: a row of `cells.csv` with the rows of `results.csv` that belong to it.

    `victims` counts clients; `images`, `done`, `failed` and `blocked` count private images. `bytes_sent` is of one client
    in one round.
    """

    id: str
    axes: Mapping[str, str]
    params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    oracle: tuple[str, ...] = ()
    adaptive: bool = False
    status: str = "done"
    reason: str = ""
    victims: int = 0
    images: int = 0
    done: int = 0
    failed: int = 0
    blocked: int = 0
    complete: bool | None = None
    asr: Measured = Measured()
    psnr: Measured = Measured()
    ssim: Measured = Measured()
    mse: Measured = Measured()
    recovered: Measured = Measured()
    nulls: Mapping[str, Null] = field(default_factory=dict)
    gain_psnr: float | None = None
    gain_ssim: float | None = None
    utility: Mapping[str, Measured] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    results: tuple[ImageResult, ...] = ()
    guaranteed: Guaranteed | None = None
    bytes_sent: float | None = None

    @property
    def told(self) -> tuple[str, ...]:
        """What a malicious server told clients beside the model, as the first case that says so has it."""
        return next((result.told for result in self.results if result.told), ())

    @property
    def unscored(self) -> bool:
        """Whether attacks finished but nobody knows the private images: a replay without ground truth."""
        return any(result.finished for result in self.results) and all(
            result.ssim is None for result in self.results if result.finished
        )

    @property
    def dataset(self) -> str:
        """Id of the data entry."""
        return self.axes.get("dataset", "")

    @property
    def attack(self) -> str:
        """Id of the attack."""
        return self.axes.get("attack", "")

    @property
    def defense(self) -> str:
        """Id of the defense."""
        return self.axes.get("defense", "")

    @property
    def protection(self) -> str:
        """Id of the defense, or of the guard where there is no defense."""
        return self.defense if self.defense not in NOTHING_THERE else self.axes.get("guard", "")

    @property
    def defended(self) -> bool:
        """Whether a defense or a guard was on."""
        name = str(self.params.get("defense", {}).get("name", self.defense))
        return name not in NOTHING_THERE or self.axes.get("guard", "") not in NOTHING_THERE

    @property
    def segments(self) -> bool:
        """Whether its model was trained with masks."""
        return any(result.truth_mask for result in self.results)

    @property
    def refused(self) -> bool:
        """Whether the combination was not possible."""
        return self.status == "refused"

    @cached_property
    def best_null(self) -> Null | None:
        """The null baseline with the highest mean PSNR, which gains are measured against; None if none was stored."""
        scored = [null for null in self.nulls.values() if null.psnr is not None]
        return max(scored, key=lambda null: null.psnr or 0.0, default=None)

    @cached_property
    def best_null_asr(self) -> float | None:
        """The highest success rate of a null baseline."""
        return max((null.asr for null in self.nulls.values() if null.asr is not None), default=None)

    @cached_property
    def best_null_recovered(self) -> float | None:
        """The highest recovery rate of a null baseline."""
        return max((null.recovered for null in self.nulls.values() if null.recovered is not None), default=None)

    @cached_property
    def successes(self) -> int | None:
        """Number of reconstructed images, where the rows agree with the stored rate."""
        counted = sum(result.success is True for result in self.results)
        rate = self.asr.value
        if rate is None or not self.results or abs(counted / len(self.results) - rate) > 1e-3:
            return None
        return counted

    @cached_property
    def label_accuracy(self) -> float | None:
        """Share of the inferred labels that are right."""
        return self._supplement["label_accuracy"]

    @cached_property
    def mask_dice(self) -> float | None:
        """Mean Dice coefficient of the masks that the attack found."""
        return self._supplement["mask_dice_mean"]

    @cached_property
    def legacy_ssim(self) -> float | None:
        """Mean SSIM by the source paper's own convention."""
        return self._supplement["legacy_ssim_mean"]

    @cached_property
    def legacy_mse(self) -> float | None:
        """Mean squared error by the source paper's own convention."""
        return self._supplement["legacy_mse_mean"]

    @cached_property
    def evaluations(self) -> float | None:
        """Gradient evaluations of all cases together."""
        return _total({result.case: result.evaluations for result in self.results})

    @cached_property
    def seconds(self) -> float | None:
        """Seconds of all cases together."""
        return _total({result.case: result.seconds for result in self.results})

    def cases(self, status: str) -> int:
        """Number of cases with that status."""
        return len({result.case for result in self.results if result.status == status})

    @cached_property
    def _supplement(self) -> Mapping[str, float | None]:
        columns = ("status", "label_correct", "mask_dice", "legacy_ssim", "legacy_mse")
        rows = pd.DataFrame({name: [getattr(result, name) for result in self.results] for name in columns})
        found = supplement_cell(rows, threshold=1.0)
        return {name: value for name, value in found.items() if not isinstance(value, str)}


@dataclass(frozen=True)
class Audit:
    """All that an output folder tells. `sweep` are cells that exist for the diagnosis of others only."""

    name: str
    cells: tuple[Cell, ...] = ()
    sweep: tuple[Cell, ...] = ()
    diagnosis: tuple[Mapping[str, Any], ...] = ()
    updates: tuple[Mapping[str, Any], ...] = ()
    created: str = ""
    finished: bool = False
    replay: bool = False
    threshold: float = 0.9
    limit_text: str = ""
    limit_holds: bool | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: float | None = None
    data: tuple[Mapping[str, Any], ...] = ()
    assumptions: tuple[Mapping[str, Any], ...] = ()
    findings: tuple[Mapping[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    versions: Mapping[str, Any] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    spec_text: str = ""
    utility: Mapping[str, Any] | None = None
    frontiers: tuple[Frontier, ...] = ()

    @property
    def datasets(self) -> tuple[str, ...]:
        """Ids of the audited data entries, in the order of the cells."""
        return tuple(dict.fromkeys(cell.dataset for cell in self.cells))

    def count(self, name: str) -> int:
        """A count of `summary.json`, recomputed from the cells where the file lacks it."""
        if name in self.counts:
            return self.counts[name]
        if name == "cells":
            return len(self.cells)
        if name == "refused":
            return sum(cell.refused for cell in self.cells)
        if name == "cases":
            return sum(cell.victims for cell in self.cells if not cell.refused)
        return sum(cell.cases(name) for cell in self.cells)


def _total(per_case: Mapping[str, float | None]) -> float | None:
    known = [value for value in per_case.values() if value is not None]
    return sum(known) if known else None

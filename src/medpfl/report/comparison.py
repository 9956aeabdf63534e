"""Which attack was the strongest, and what a defense changed on the same victims."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from medpfl.metrics.statistics import paired_difference
from medpfl.report.settings import setting_key, varying_axes
from medpfl.report.views import Audit, Cell, Measured

Level = Literal["reconstructed", "closer", "null_level", "unjudged", "unscored", "blocked", "nothing"]
"""How bad it is: from images given away, over traces of them, to nothing that could be measured."""


@dataclass(frozen=True)
class Change:
    """Two cells on the same private images, defended minus undefended.

    psnr: mean difference over the images that both attacks finished, with its interval over victims.
    """

    undefended: Cell
    victims: int
    images: int
    psnr: Measured
    successes_before: int
    successes_after: int


@dataclass(frozen=True)
class DefenseOutcome:
    """What is left to the strongest attack without oracle knowledge against one defense, None if none finished.

    cells: all cells with this defense and data. informed: finished attacks without oracle that knew the defense.
    """

    cells: tuple[Cell, ...]
    strongest: Cell | None
    change: Change | None
    informed: tuple[str, ...]


@dataclass(frozen=True)
class SettingOutcome:
    """The strongest attack without oracle knowledge in one setting: without defense, where that was audited.

    name: the ids of the axes in which the data set's settings differ.
    """

    name: str
    cells: tuple[Cell, ...]
    strongest: Cell | None


@dataclass(frozen=True)
class DatasetOutcome:
    """The cells of one data set, and the strongest attacks without and with oracle knowledge."""

    dataset: str
    cells: tuple[Cell, ...]
    strongest: Cell | None
    strongest_oracle: Cell | None
    defenses: tuple[DefenseOutcome, ...]
    settings: tuple[SettingOutcome, ...]

    @property
    def level(self) -> Level:
        """The level of the strongest attack."""
        if self.strongest is not None:
            return level(self.strongest)
        if any(cell.unscored for cell in self.cells):
            return "unscored"
        return "blocked" if any(cell.blocked for cell in self.cells) else "nothing"


def outcomes(audit: Audit) -> tuple[DatasetOutcome, ...]:
    """One outcome per data set, in the order of the cells."""
    return tuple(
        _outcome(dataset, [cell for cell in audit.cells if cell.dataset == dataset]) for dataset in audit.datasets
    )


def strongest(cells: Iterable[Cell]) -> Cell | None:
    """The cell with the highest success rate; among equal ones the one with the highest mean PSNR."""
    measured = [cell for cell in cells if cell.done > 0 and cell.asr.value is not None]
    return max(measured, key=_strength, default=None)


def level(cell: Cell) -> Level:
    """How a cell's numbers stand to its own null baselines.

    `reconstructed` needs a success rate whose whole interval lies above every baseline's (any success, where no
    baseline has one); `closer` a mean PSNR or SSIM whose whole interval lies above the baselines'.
    """
    if cell.done == 0 or cell.asr.value is None:
        return "blocked" if cell.blocked else "nothing"
    if cell.best_null_asr is None and cell.best_null is None:
        return "unjudged"
    null_rate = cell.best_null_asr or 0.0
    if cell.asr.value > 0 and (null_rate == 0 or _above(cell.asr, null_rate)):
        return "reconstructed"
    return "closer" if closer_by(cell) else "null_level"


def change(defended: Cell, undefended: Cell) -> Change | None:
    """What differs between two cells on their common private images; None without a common one."""
    before = {result.private_image: result for result in undefended.results}
    pairs = [(before[after.private_image], after) for after in defended.results if after.private_image in before]
    if not pairs:
        return None
    scored = [
        (first.psnr, second.psnr, (second.seed, second.victim))
        for first, second in pairs
        if first.psnr is not None and second.psnr is not None
    ]
    found = paired_difference(
        [after for _, after, _ in scored],
        [before for before, _, _ in scored],
        ["/".join(victim) for _, _, victim in scored],
        seed=0,
    )
    return Change(
        undefended=undefended,
        victims=len({after.private_image[:2] for _, after in pairs}),
        images=len(pairs),
        psnr=Measured(found.mean, found.low, found.high),
        successes_before=sum(first.success is True for first, _ in pairs),
        successes_after=sum(second.success is True for _, second in pairs),
    )


def _outcome(dataset: str, cells: Sequence[Cell]) -> DatasetOutcome:
    honest = [cell for cell in cells if not cell.oracle]
    groups: dict[tuple[bool, str, str], list[Cell]] = {}
    for cell in cells:
        if not cell.refused:
            groups.setdefault((cell.defended, cell.axes.get("guard", ""), cell.defense), []).append(cell)
    ordered = [groups[key] for key in sorted(groups, key=lambda key: key[0])]
    return DatasetOutcome(
        dataset=dataset,
        cells=tuple(cells),
        strongest=strongest(honest),
        strongest_oracle=strongest(cell for cell in cells if cell.oracle),
        defenses=tuple(_defense_outcome(group, honest) for group in ordered),
        settings=_setting_outcomes(cells),
    )


def _setting_outcomes(cells: Sequence[Cell]) -> tuple[SettingOutcome, ...]:
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        if not cell.refused:
            groups.setdefault(setting_key(cell), []).append(cell)
    axes = varying_axes([cell for group in groups.values() for cell in group])
    found = []
    for group in groups.values():
        honest = [cell for cell in group if not cell.oracle]
        bare = [cell for cell in honest if not cell.defended]
        name = ", ".join(group[0].axes.get(axis, "") for axis in axes)
        found.append(SettingOutcome(name, tuple(group), strongest(bare or honest)))
    return tuple(found)


def _defense_outcome(group: Sequence[Cell], honest: Sequence[Cell]) -> DefenseOutcome:
    best = strongest(cell for cell in group if not cell.oracle)
    found = None
    if best is not None and best.defended:
        same = [cell for cell in honest if not cell.defended and setting_key(cell) == setting_key(best)]
        undefended = strongest(same)
        found = change(best, undefended) if undefended is not None else None
    informed = dict.fromkeys(cell.attack for cell in group if cell.adaptive and cell.done and not cell.oracle)
    return DefenseOutcome(tuple(group), best, found, tuple(informed))


def _strength(cell: Cell) -> tuple[float, float]:
    return cell.asr.value or 0.0, cell.psnr.value if cell.psnr.value is not None else float("-inf")


def closer_by(cell: Cell) -> tuple[str, ...]:
    """The measures, of PSNR and SSIM, whose whole interval lies above every null baseline's mean."""
    best_ssim = max((null.ssim for null in cell.nulls.values() if null.ssim is not None), default=None)
    best_psnr = cell.best_null.psnr if cell.best_null is not None else None
    found = (("PSNR", _above(cell.psnr, best_psnr)), ("SSIM", _above(cell.ssim, best_ssim)))
    return tuple(name for name, above in found if above)


def _above(measured: Measured, null: float | None) -> bool:
    """One victim has no interval, so that nothing is claimed of it: another victim could have shown the contrary."""
    return measured.low is not None and null is not None and measured.low > null

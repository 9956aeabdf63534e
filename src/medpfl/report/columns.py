"""The columns of the table of cells: what each says of a cell, how it sorts, and whether it is shown at first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from medpfl.report.formatting import DASH, decimals, duration, interval, percent, percent_interval, signed
from medpfl.report.views import AXES, Cell, Measured

AXIS_TITLES = {
    "dataset": "Data",
    "model": "Model",
    "recipe": "Recipe",
    "threat_model": "Threat model",
    "channel": "Channel",
    "defense": "Defense",
    "guard": "Guard",
    "attack": "Attack",
}
"""Axis names as headings."""

STATUS_WORDS = {"done": "done", "partial": "not finished", "refused": "refused"}


@dataclass(frozen=True)
class Value:
    """What stands in one place of the table. `sort` is a number or text; empty values sort last."""

    text: str
    sort: float | str | None = None
    note: str = ""


@dataclass(frozen=True)
class Column:
    """A column of the table. An essential one is shown at first, the others on demand."""

    title: str
    explanation: str
    numeric: bool
    essential: bool
    value: Callable[[Cell], Value]


def columns_of(cells: Sequence[Cell], threshold: float) -> tuple[Column, ...]:
    """All columns for these cells."""
    return (*_axis_columns(cells), *_text_columns(cells), *_number_columns(cells, threshold))


def _axis_columns(cells: Sequence[Cell]) -> list[Column]:
    return [
        Column(
            AXIS_TITLES[axis],
            f"id of the {axis.replace('_', ' ')} in the spec",
            numeric=False,
            essential=axis == "attack" or len({cell.axes.get(axis, "") for cell in cells}) > 1,
            value=_axis_value(axis),
        )
        for axis in ("attack", "defense", *(axis for axis in AXES if axis not in ("attack", "defense")))
    ]


def _axis_value(axis: str) -> Callable[[Cell], Value]:
    def value(cell: Cell) -> Value:
        found = cell.axes.get(axis, "")
        return Value(found or DASH, found or None, _marks(cell) if axis == "attack" else "")

    return value


def _marks(cell: Cell) -> str:
    """What must be read with an attack's numbers wherever they stand."""
    marks = [f"oracle: {', '.join(cell.oracle).replace('_', ' ')}"] if cell.oracle else []
    return ", ".join([*marks, "knows the defense"] if cell.adaptive else marks)


def _text_columns(cells: Sequence[Cell]) -> list[Column]:
    return [
        Column("Status", "done, not finished, or refused with the reason", False, _differs(cells, "status"), _status),
        Column(
            "Oracle",
            "knowledge that the attack read and that a real adversary would not have",
            False,
            False,
            lambda cell: Value(", ".join(cell.oracle).replace("_", " ") or "none", ", ".join(cell.oracle) or "none"),
        ),
        Column(
            "Knows defense",
            "whether the attack knew the mechanism of the defense",
            False,
            False,
            lambda cell: Value("yes" if cell.adaptive else "no", "yes" if cell.adaptive else "no"),
        ),
    ]


def _number_columns(cells: Sequence[Cell], threshold: float) -> list[Column]:
    some_failed = any(cell.failed or cell.blocked for cell in cells)
    utility = {name for cell in cells for name in cell.utility}
    columns = [
        Column(
            "Reconstructed",
            f"share of all private images with SSIM of at least {threshold:g} (ASR), with its 95% interval",
            True,
            True,
            lambda cell: Value(percent(cell.asr.value), cell.asr.value, percent_interval(cell.asr)),
        ),
        Column(
            "Nulls reach",
            "highest share of a null baseline at the same threshold",
            True,
            True,
            lambda cell: Value(percent(cell.best_null_asr), cell.best_null_asr),
        ),
        Column(
            "Above 30 dB",
            "share of all private images with a PSNR above 30 dB (recovery rate), with its 95% interval and the highest "
            "share of a null baseline",
            True,
            any(cell.recovered.value for cell in cells),
            lambda cell: Value(percent(cell.recovered.value), cell.recovered.value, _recovered_note(cell)),
        ),
        Column("PSNR", "mean in dB, with its 95% interval", True, True, lambda cell: _mean(cell.psnr, 1)),
        Column(
            "Best null PSNR",
            "mean PSNR in dB of the best null baseline on the same images",
            True,
            True,
            lambda cell: _number(cell.best_null.psnr if cell.best_null else None, 1),
        ),
        Column(
            "Gain",
            "mean PSNR minus that of the best null baseline, in dB",
            True,
            True,
            lambda cell: Value(signed(cell.gain_psnr), cell.gain_psnr),
        ),
        Column("SSIM", "mean, with its 95% interval", True, True, lambda cell: _mean(cell.ssim, 2)),
        _null_column("nearest", "Other image SSIM", "ssim", True),
        Column(
            "Bytes sent",
            "what one client sends in a round, compressed as the defense has it",
            True,
            len({cell.bytes_sent for cell in cells if cell.bytes_sent is not None}) > 1,
            lambda cell: _number(cell.bytes_sent, 0, grouped=True),
        ),
        Column("Victims", "clients that were attacked", True, True, lambda cell: _whole(cell, cell.victims)),
        Column("Done", "private images of finished cases", True, some_failed, lambda cell: _whole(cell, cell.done)),
        Column(
            "Failed",
            "private images of cases that broke down",
            True,
            some_failed,
            lambda cell: _whole(cell, cell.failed),
        ),
        Column(
            "Blocked",
            "private images of cases that a guard stopped",
            True,
            any(cell.blocked for cell in cells),
            lambda cell: _whole(cell, cell.blocked),
        ),
        _null_column("nearest", "Other image PSNR", "psnr", False),
        _null_column("class_mean", "Class mean SSIM", "ssim", False),
        _null_column("class_mean", "Class mean PSNR", "psnr", False),
        _null_column("noise", "Noise SSIM", "ssim", False),
        _null_column("noise", "Noise PSNR", "psnr", False),
        Column(
            "SSIM gain",
            "mean SSIM minus that of the best null baseline",
            True,
            False,
            lambda cell: Value(signed(cell.gain_ssim, 2), cell.gain_ssim),
        ),
        Column("MSE", "mean squared error, with its 95% interval", True, False, lambda cell: _mean(cell.mse, 4)),
        Column(
            "Label accuracy",
            "share of the inferred labels that are right",
            True,
            False,
            lambda cell: Value(percent(cell.label_accuracy), cell.label_accuracy),
        ),
        Column(
            "Mask Dice",
            "mean Dice coefficient of the masks that the attack found and the true ones",
            True,
            any(cell.mask_dice is not None for cell in cells),
            lambda cell: _number(cell.mask_dice, 2),
        ),
        Column(
            "Evaluations",
            "gradient evaluations of all cases together",
            True,
            False,
            lambda cell: _number(cell.evaluations, 0, grouped=True),
        ),
        Column(
            "Time",
            "computing time of all cases together",
            True,
            False,
            lambda cell: Value(duration(cell.seconds), cell.seconds),
        ),
        Column(
            "Legacy SSIM",
            "mean by the convention of the attack's paper: for reproduction only",
            True,
            False,
            lambda cell: _number(cell.legacy_ssim, 2),
        ),
        Column(
            "Legacy MSE",
            "mean by the convention of the attack's paper: for reproduction only",
            True,
            False,
            lambda cell: _number(cell.legacy_mse, 4),
        ),
    ]
    return columns + [
        Column(_UTILITY_TITLES[name], "utility of the model that is trained so", True, True, _utility_value(name))
        for name in _UTILITY_TITLES
        if name in utility
    ]


_UTILITY_TITLES = {"utility_balanced_accuracy": "Balanced accuracy", "utility_auc": "AUC"}


def _utility_value(name: str) -> Callable[[Cell], Value]:
    return lambda cell: _mean(cell.utility.get(name, Measured()), 2)


def _null_column(null: str, title: str, metric: str, essential: bool) -> Column:
    words = {
        "nearest": "the most similar other image, chosen with the truth in hand",
        "class_mean": "the mean image of the true class",
        "noise": "uniform noise",
    }[null]
    unit = " in dB" if metric == "psnr" else ""

    def value(cell: Cell) -> Value:
        found = cell.nulls.get(null)
        return _number(getattr(found, metric) if found else None, 1 if metric == "psnr" else 2)

    return Column(title, f"null baseline: mean {metric.upper()}{unit} of {words}", True, essential, value)


def _recovered_note(cell: Cell) -> str:
    """Interval and best null of a recovery rate, a line each."""
    null = cell.best_null_recovered
    parts = (percent_interval(cell.recovered), "" if null is None else f"nulls {percent(null)}")
    return "\n".join(part for part in parts if part)


def _status(cell: Cell) -> Value:
    word = STATUS_WORDS.get(cell.status, cell.status)
    return Value(word, word, cell.reason)


def _differs(cells: Sequence[Cell], name: str) -> bool:
    return len({getattr(cell, name) for cell in cells}) > 1 or any(cell.status != "done" for cell in cells)


def _whole(cell: Cell, value: int) -> Value:
    return Value(DASH) if cell.refused else Value(f"{value:,}", value)


def _number(value: float | None, places: int, grouped: bool = False) -> Value:
    text = f"{value:,.0f}" if grouped and value is not None else decimals(value, places)
    return Value(text, value)


def _mean(measured: Measured, places: int) -> Value:
    return Value(decimals(measured.value, places), measured.value, interval(measured, places))

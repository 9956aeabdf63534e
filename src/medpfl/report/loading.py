"""Reads the files of an output folder into views. Missing files, columns and values become None, never NaN."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from medpfl.attacks.told import TOLD
from medpfl.audit.frontier import frontiers
from medpfl.audit.limits import Limit, all_satisfy, parse_limit
from medpfl.core.errors import StoreError
from medpfl.report.guaranteed import Guaranteed
from medpfl.report.views import AXES, NULLS, Audit, Cell, ImageResult, Measured, Null

Row = Mapping[str, str]

UTILITY = ("utility_balanced_accuracy", "utility_auc")
"""Columns of `cells.csv` that say what a defense costs, where it was measured."""


def load_audit(folder: Path, limit: Limit | None = None) -> Audit:
    """Everything that an output folder tells, finished or not. limit: what it is judged by in place of the audit's own.

    Raises StoreError where the folder is missing, holds no results, or holds a file that cannot be read.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder}: there is no such folder; give the --out folder of an audit")
    if not (folder / "cells.csv").is_file() and not (folder / "summary.json").is_file():
        raise StoreError(
            f"{folder}: found neither cells.csv nor summary.json, so there is nothing to report; "
            f"run 'medpfl audit SPEC --out {folder}' first"
        )
    summary = _read_json(folder / "summary.json")
    results = _results_by_cell(read_table(folder / "results.csv"))
    rows = read_table(folder / "cells.csv")
    cells, sweep = (
        tuple(
            _cell(row, results.get(row.get("cell", ""), ())) for row in rows if bool(row.get("diagnosis_of")) is extra
        )
        for extra in (False, True)
    )
    stored = _mapping(summary.get("limit"))
    text = _text(stored.get("text"))
    wanted = limit if limit is not None else parse_limit(text, "summary.json, limit") if text else None
    own = [row for row in rows if not row.get("diagnosis_of")]
    threshold = number(summary.get("threshold"))
    return Audit(
        name=_text(summary.get("name")) or folder.resolve().name,
        cells=cells,
        sweep=sweep,
        diagnosis=_mappings(summary.get("diagnosis")),
        updates=_mappings(summary.get("updates")),
        created=_text(summary.get("created")),
        finished=boolean(summary.get("finished")) is True,
        replay=boolean(summary.get("replay")) is True,
        threshold=0.9 if threshold is None else threshold,
        limit_text=text if limit is None else str(limit),
        limit_holds=boolean(stored.get("holds")) if limit is None else all_satisfy(limit, own),
        counts=_counts(summary.get("counts")),
        seconds=number(summary.get("seconds")),
        data=_mappings(summary.get("data")),
        assumptions=_mappings(summary.get("assumptions")),
        findings=_mappings(summary.get("findings")),
        warnings=_sentences(summary.get("warnings")),
        versions=_mapping(summary.get("versions")),
        hardware=_mapping(summary.get("hardware")),
        plan=_mapping(summary.get("plan")),
        spec_text=_read_text(folder / "spec.yaml"),
        utility=_mapping(summary.get("utility")) or None,
        frontiers=frontiers(rows, _mapping(summary.get("utility")) or None, wanted),
    )


def number(value: object) -> float | None:
    """A finite number, None for anything else.

    >>> number("0.5"), number(""), number("nan"), number(None)
    (0.5, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def boolean(value: object) -> bool | None:
    """True or False as JSON or as the tables write it, None for anything else.

    >>> boolean("true"), boolean("false"), boolean("")
    (True, False, None)
    """
    return {"true": True, "false": False}.get(str(value).strip().lower())


def _results_by_cell(rows: list[Row]) -> dict[str, tuple[ImageResult, ...]]:
    grouped: dict[str, list[ImageResult]] = defaultdict(list)
    for row in rows:
        result = _image_result(row)
        grouped[result.cell].append(result)
    return {cell: tuple(results) for cell, results in grouped.items()}


def _image_result(row: Row) -> ImageResult:
    null_ssim, null_psnr = (
        {null: value for null in NULLS if (value := number(row.get(f"null_{null}_{metric}"))) is not None}
        for metric in ("ssim", "psnr")
    )
    return ImageResult(
        case=row.get("case", ""),
        cell=row.get("cell", ""),
        seed=row.get("seed", ""),
        victim=row.get("victim", ""),
        client=row.get("client", ""),
        position=_whole(row.get("position")),
        item=row.get("item", ""),
        status=row.get("status", ""),
        reason=row.get("reason", ""),
        success=boolean(row.get("success")),
        psnr=number(row.get("psnr")),
        ssim=number(row.get("ssim")),
        mse=number(row.get("mse")),
        legacy_ssim=number(row.get("legacy_ssim")),
        legacy_mse=number(row.get("legacy_mse")),
        label=row.get("label", ""),
        label_correct=boolean(row.get("label_correct")),
        evaluations=number(row.get("gradient_evaluations")),
        seconds=number(row.get("seconds")),
        stop_reason=row.get("stop_reason", ""),
        objective=number(row.get("objective")),
        truth_image=row.get("truth_image", ""),
        reconstruction_image=row.get("reconstruction_image", ""),
        truth_mask=row.get("truth_mask", ""),
        reconstruction_mask=row.get("reconstruction_mask", ""),
        mask_dice=number(row.get("mask_dice")),
        fallback=row.get("status") == "done" and row.get("candidate") == "",
        null_ssim=null_ssim,
        null_psnr=null_psnr,
        verdict=row.get("verdict", ""),
        verdict_reason=row.get("verdict_reason", ""),
        others_withheld=number(row.get("others_withheld")),
        told=tuple(note for note in row.get("notes", "").split("; ") if note.startswith(TOLD)),
    )


def _cell(row: Row, results: tuple[ImageResult, ...]) -> Cell:
    nulls = (
        Null(null, *(number(row.get(f"null_{null}_{metric}")) for metric in ("psnr", "ssim", "asr", "recovered")))
        for null in NULLS
    )
    utility = {name: _measured(row, name, name) for name in UTILITY}
    return Cell(
        id=row.get("cell", ""),
        axes={axis: row.get(axis, "") for axis in AXES},
        params={axis: _params(row.get(f"{axis}_params", "")) for axis in AXES},
        oracle=tuple(part for part in row.get("oracle", "").split(";") if part),
        adaptive=boolean(row.get("adaptive")) is True,
        status=row.get("status", "") or "done",
        reason=row.get("reason", ""),
        victims=_whole(row.get("victims")),
        images=_whole(row.get("images")),
        done=_whole(row.get("done")),
        failed=_whole(row.get("failed")),
        blocked=_whole(row.get("blocked")),
        complete=boolean(row.get("complete")),
        asr=_measured(row, "asr", "asr"),
        psnr=_measured(row, "psnr", "psnr_mean"),
        ssim=_measured(row, "ssim", "ssim_mean"),
        mse=_measured(row, "mse", "mse_mean"),
        recovered=_measured(row, "recovered", "recovered"),
        nulls={null.name: null for null in nulls if (null.psnr, null.ssim, null.asr) != (None, None, None)},
        gain_psnr=number(row.get("gain_psnr")),
        gain_ssim=number(row.get("gain_ssim")),
        utility={name: measured for name, measured in utility.items() if measured.value is not None},
        warnings=tuple(part.strip() for part in row.get("warnings", "").split(";") if part.strip()),
        results=results,
        guaranteed=_guaranteed(row),
        bytes_sent=number(row.get("bytes_sent")),
    )


def _guaranteed(row: Row) -> Guaranteed | None:
    """None in folders that were written before there was such a column."""
    if not row.get("guarantee"):
        return None
    infinite = row.get("epsilon", "") == "inf"
    return Guaranteed(
        told=row["guarantee"],
        epsilon=math.inf if infinite else number(row.get("epsilon")),
        delta=number(row.get("delta")),
        unit=row.get("privacy_unit", ""),
        neighbors=row.get("neighbors", ""),
        added_by=row.get("noise_added_by", ""),
        rounds=_whole(row.get("composed_rounds")),
        accountant=row.get("accountant", ""),
        prior=number(row.get("prior_success")),
        prior_images=_whole(row.get("prior_images")),
        bound=number(row.get("reconstruction_bound")),
        theorem=row.get("reconstruction_theorem", ""),
        observed_rounds=_whole(row.get("observed_rounds")),
        observed_bound=number(row.get("observed_bound")),
        no_prior_psnr=number(row.get("no_prior_psnr")),
        remarks=tuple(part for part in row.get("guarantee_remarks", "").split("; ") if part),
        curve=tuple(
            (prior, most)
            for key, value in _params(row.get("reconstruction_curve", "")).items()
            if (prior := number(key)) is not None and (most := number(value)) is not None
        ),
    )


def _measured(row: Row, prefix: str, column: str) -> Measured:
    return Measured(number(row.get(column)), number(row.get(f"{prefix}_low")), number(row.get(f"{prefix}_high")))


def _params(text: str) -> Mapping[str, Any]:
    try:
        return _mapping(json.loads(text)) if text else {}
    except json.JSONDecodeError:
        return {}


def read_table(path: Path) -> list[Row]:
    """Rows as they are written: every value a string, so that an id such as `NA` or `1e3` stays what it is."""
    if not path.is_file():
        return []
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8", comment=None)
    except pd.errors.EmptyDataError:
        return []
    except (pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        raise StoreError(f"{path}: cannot be read as a table ({error}); run the audit again to rewrite it") from error
    names = [str(name) for name in frame.columns]
    return [dict(zip(names, map(str, values), strict=True)) for values in frame.itertuples(index=False, name=None)]


def _read_json(path: Path) -> Mapping[str, Any]:
    text = _read_text(path)
    try:
        return _mapping(json.loads(text)) if text else {}
    except json.JSONDecodeError as error:
        raise StoreError(f"{path}: is not valid JSON ({error}); run the audit again to rewrite it") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except (UnicodeDecodeError, OSError) as error:
        raise StoreError(f"{path}: cannot be read ({error}); run the audit again to rewrite it") from error


def _whole(value: object) -> int:
    found = number(value)
    return 0 if found is None else int(found)


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _mappings(value: object) -> tuple[Mapping[str, Any], ...]:
    return tuple(entry for entry in value if isinstance(entry, dict)) if isinstance(value, list) else ()


def _counts(value: object) -> Mapping[str, int]:
    return {str(name): int(found) for name, entry in _mapping(value).items() if (found := number(entry)) is not None}


def _sentences(value: object) -> tuple[str, ...]:
    """Texts of a list of strings, or of mappings with a text and perhaps the defense that it is about."""
    if not isinstance(value, list):
        return ()
    texts = []
    for entry in value:
        if isinstance(entry, dict):
            text, about = _text(entry.get("text") or entry.get("message")), _text(entry.get("defense"))
            texts.append(f"{about}: {text}" if about and text else text)
        else:
            texts.append(_text(entry))
    return tuple(dict.fromkeys(text for text in texts if text))

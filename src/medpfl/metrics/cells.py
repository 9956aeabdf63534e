"""The numbers of one cell, from its rows in `results.csv`."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medpfl.metrics.nulls import NULLS
from medpfl.metrics.statistics import Interval, bootstrap_mean, median, success_rate

FIDELITY = ("psnr", "ssim", "mse")
"""The metrics that have a mean, an interval and a median in `cells.csv`."""

Summary = dict[str, float | int | str | None]


def summarize_cell(rows: pd.DataFrame, *, threshold: float, seed: int) -> Summary:
    """The numbers of `cells.csv` for one cell; None where there is nothing to compute a number from.

    `rows` has one row per private image with the columns of `results.csv`, and `null_N_psnr`, `null_N_ssim` for the
    null baselines N that exist; a column that is not there counts as empty. `threshold` is the SSIM of a success,
    `seed` that of the bootstrap.

    - `victims` counts clients, once per seed; `images`, `done`, `failed` and `blocked` count private images.
      `complete` is true if there are images and all are done, so that the means leave none out.
    - `asr` is over all images: a failed one counts as not successful, and so does a blocked one, because what a guard
      stopped never reached the adversary. Null baselines have their rate over every image that has their scores.
    - Means, medians and the nulls' PSNR and SSIM are over the images that are done, so that a `gain_X`, the mean
      minus the largest mean of the null baselines, compares the same images.
    - Intervals resample victims (`medpfl.metrics.statistics`).
    """
    rows = _with_columns(rows, "seed", "victim", "status")
    victims = victims_of(rows)
    status = rows["status"].astype(str)
    done = (status == "done").to_numpy()
    finished = rows[done]
    success = (numbers(rows, "ssim") >= threshold).to_numpy() & done

    summary: Summary = {
        "victims": len(set(victims.tolist())),
        "images": len(rows),
        "done": int(done.sum()),
        "failed": int((status == "failed").sum()),
        "blocked": int((status == "blocked").sum()),
        "complete": len(rows) > 0 and bool(done.all()),
    }
    summary |= interval_columns("asr", success_rate(success, victims, seed=seed), mean="asr")
    for name in FIDELITY:
        values = numbers(finished, name).to_numpy()
        summary |= interval_columns(name, bootstrap_mean(values, victims[done], seed=seed), mean=f"{name}_mean")
        summary[f"{name}_median"] = median(values)
    for name in NULLS:
        summary[f"null_{name}_psnr"] = mean_or_none(numbers(finished, f"null_{name}_psnr"))
        summary[f"null_{name}_ssim"] = mean_or_none(numbers(finished, f"null_{name}_ssim"))
        everywhere = numbers(rows, f"null_{name}_ssim").dropna()
        summary[f"null_{name}_asr"] = mean_or_none((everywhere >= threshold).astype(float))
    for name in ("psnr", "ssim"):
        summary[f"gain_{name}"] = _gain(summary, name)
    return summary


def supplement_cell(rows: pd.DataFrame, *, threshold: float) -> Summary:
    """What `cells.csv` has no column for: label accuracy, and the source paper's own conventions.

    `label_accuracy` is over the finished images whose label was inferred; `legacy_asr` is the share of all images with
    a legacy SSIM at the threshold or above; the legacy means are over the finished images, and empty as soon as one
    value is undefined under its convention. For reproduction only. `mask_dice_mean` is over the finished images for
    which the attack found a mask.
    """
    rows = _with_columns(rows, "status", "label_correct")
    done = (rows["status"].astype(str) == "done").to_numpy()
    finished = rows[done]
    correct = finished["label_correct"].dropna().astype(str).str.lower()
    correct = correct[correct.isin(["true", "false"])]
    legacy = (numbers(rows, "legacy_ssim") >= threshold).to_numpy() & done
    return {
        "label_accuracy": mean_or_none((correct == "true").astype(float)),
        "mask_dice_mean": mean_or_none(numbers(finished, "mask_dice").dropna()),
        "legacy_asr": float(legacy.mean()) if len(rows) else None,
        "legacy_ssim_mean": mean_or_none(numbers(finished, "legacy_ssim"), strict=True),
        "legacy_mse_mean": mean_or_none(numbers(finished, "legacy_mse"), strict=True),
    }


def _with_columns(rows: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows with empty columns where these are not there."""
    return rows.reindex(columns=[*rows.columns, *(column for column in columns if column not in rows.columns)])


def victims_of(rows: pd.DataFrame) -> NDArray[np.int64]:
    """The number of the victim that each row belongs to, counted over all seeds."""
    found: NDArray[np.int64] = rows.groupby(["seed", "victim"], sort=True).ngroup().to_numpy(dtype=np.int64)
    return found


def numbers(rows: pd.DataFrame, column: str) -> pd.Series[float]:
    """A column as floats; NaN where it is empty or not there."""
    if column not in rows.columns:
        return pd.Series(float("nan"), index=rows.index, dtype="float64")
    return pd.to_numeric(rows[column]).astype("float64")


def mean_or_none(values: pd.Series[float], *, strict: bool = False) -> float | None:
    """The mean; None without values, and with `strict` as soon as one is missing."""
    mean = float(values.mean(skipna=not strict)) if len(values) else float("nan")
    return None if mean != mean else mean


def interval_columns(name: str, interval: Interval, *, mean: str) -> Summary:
    """An interval as columns: the mean under its own name, then `name_low` and `name_high`."""
    return {mean: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _gain(summary: Summary, name: str) -> float | None:
    mean = summary[f"{name}_mean"]
    nulls = [value for null in NULLS if isinstance(value := summary[f"null_{null}_{name}"], float)]
    return mean - max(nulls) if isinstance(mean, float) and nulls else None

"""The interval of the gain over the best null baseline."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from medpfl.metrics.cells import summarize_cell
from medpfl.metrics.gains import gain_intervals


def rows(count: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    psnr, nearest = rng.normal(20, 3, count), rng.normal(18, 3, count)
    return pd.DataFrame(
        {
            "seed": 0,
            "victim": range(count),
            "status": "done",
            "psnr": psnr,
            "ssim": 0.5,
            "mse": 0.01,
            "null_nearest_psnr": nearest,
            "null_class_mean_psnr": 1.0,
            "null_nearest_ssim": 0.5,
        }
    )


def test_it_is_the_interval_of_a_paired_mean() -> None:
    table = rows(400)
    found = gain_intervals(table, seed=0)
    difference = table["psnr"] - table["null_nearest_psnr"]
    half = 1.96 * difference.std() / np.sqrt(400)
    assert found["gain_psnr_low"] == pytest.approx(difference.mean() - half, abs=0.06)
    assert found["gain_psnr_high"] == pytest.approx(difference.mean() + half, abs=0.06)
    assert summarize_cell(table, threshold=0.9, seed=0)["gain_psnr"] == pytest.approx(difference.mean())
    assert (found["gain_ssim_low"], found["gain_ssim_high"]) == (0.0, 0.0)


def test_without_results_or_nulls_there_is_none() -> None:
    nothing = {f"gain_{metric}_{end}": None for metric in ("psnr", "ssim") for end in ("low", "high")}
    assert gain_intervals(rows(4).iloc[:0], seed=0) == nothing
    assert gain_intervals(rows(4).assign(status="failed"), seed=0) == nothing

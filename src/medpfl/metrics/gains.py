"""How far an attack goes beyond the best null baseline, with an interval over victims."""

from __future__ import annotations

import pandas as pd

from medpfl.metrics.cells import Summary, interval_columns, mean_or_none, numbers, victims_of
from medpfl.metrics.nulls import NULLS
from medpfl.metrics.statistics import paired_difference


def gain_intervals(rows: pd.DataFrame, *, seed: int) -> Summary:
    """`gain_X_low` and `gain_X_high` for PSNR and SSIM: image by image, what came back minus the best null baseline.

    The best baseline is the one with the largest mean over the finished images, as for `gain_X` of `summarize_cell`.
    """
    finished = rows[rows["status"].astype(str) == "done"] if len(rows) else rows
    found: Summary = {}
    for metric in ("psnr", "ssim"):
        means = {name: mean_or_none(numbers(finished, f"null_{name}_{metric}")) for name in NULLS}
        known = {name: mean for name, mean in means.items() if mean is not None}
        if not known:
            found |= {f"gain_{metric}_low": None, f"gain_{metric}_high": None}
            continue
        own, null = (
            numbers(finished, metric),
            numbers(finished, f"null_{max(known, key=lambda name: known[name])}_{metric}"),
        )
        both = (own.notna() & null.notna()).to_numpy()
        interval = paired_difference(own[both], null[both], victims_of(finished)[both], seed=seed)
        columns = interval_columns(f"gain_{metric}", interval, mean="mean")
        found |= {name: value for name, value in columns.items() if name != "mean"}
    return found

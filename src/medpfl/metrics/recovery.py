"""How many private images came back nearly as they are: the recovery rate that closed-form attacks are reported with."""

from __future__ import annotations

import pandas as pd

from medpfl.metrics.cells import Summary, interval_columns, mean_or_none, numbers, victims_of
from medpfl.metrics.nulls import NULLS
from medpfl.metrics.statistics import success_rate

RECOVERED = 30.0
"""An image whose PSNR is above so many dB counts as recovered."""


def recovery_rates(rows: pd.DataFrame, *, seed: int) -> Summary:
    """Share of all private images of a cell that were recovered, and of the null baselines' pictures of them.

    `rows` and `seed` are as in `medpfl.metrics.cells.summarize_cell`. A failed or blocked image counts as not
    recovered. A null baseline has its rate over every image that has its scores.

    >>> rows = pd.DataFrame({"seed": 0, "victim": [0, 1], "status": "done", "psnr": [31.0, 25.0]})
    >>> recovery_rates(rows.assign(null_nearest_psnr=[20.0, 33.0]), seed=0)["null_nearest_recovered"]
    0.5
    """
    done = rows["status"].astype(str) == "done"
    recovered = ((numbers(rows, "psnr") > RECOVERED) & done).to_numpy()
    rate = success_rate(recovered, victims_of(rows), seed=seed)
    found = interval_columns("recovered", rate, mean="recovered")
    for name in NULLS:
        scored = numbers(rows, f"null_{name}_psnr").dropna()
        found[f"null_{name}_recovered"] = mean_or_none((scored > RECOVERED).astype(float))
    return found

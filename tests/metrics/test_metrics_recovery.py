"""The recovery rate: how many images came back above 30 dB, and how many null baselines get there."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from scipy.stats import beta

from medpfl.metrics.recovery import recovery_rates


def row(victim: int, psnr: float | None, status: str = "done", **more: Any) -> dict[str, Any]:
    return {"seed": 0, "victim": victim, "status": status, "psnr": psnr, "null_nearest_psnr": 25.0, **more}


def rates(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return recovery_rates(pd.DataFrame(rows), seed=0)


def test_failed_and_blocked_images_count_as_not_recovered_and_thirty_is_not_above_thirty() -> None:
    found = rates([row(0, 30.0), row(0, 30.01), row(1, 99.0), row(2, 99.0, "failed"), row(3, None, "blocked")])
    assert found["recovered"] == 2 / 5
    assert found["recovered_low"] < 2 / 5 < found["recovered_high"]


def test_null_baselines_have_their_own_rate_at_the_same_threshold() -> None:
    rows = [row(0, 99.0, null_noise_psnr=8.0), row(1, 99.0, null_nearest_psnr=31.0), row(2, 99.0, "failed")]
    found = rates(rows)
    assert found["null_nearest_recovered"] == 1 / 3
    assert found["null_noise_recovered"] == 0.0
    assert found["null_class_mean_recovered"] is None


def test_all_recovered_of_four_victims_does_not_read_as_certain() -> None:
    found = rates([row(victim, 60.0) for victim in range(4) for _ in range(8)])
    assert (found["recovered"], found["recovered_high"]) == (1.0, 1.0)
    assert found["recovered_low"] == pytest.approx(beta.ppf(0.025, 4, 1))

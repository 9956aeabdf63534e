"""A cell's numbers from its result rows."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pandas as pd
import pytest

from medpfl.metrics.cells import summarize_cell, supplement_cell

COLUMNS = [
    "victims",
    "images",
    "done",
    "failed",
    "blocked",
    "complete",
    "asr",
    "asr_low",
    "asr_high",
    "psnr_mean",
    "psnr_low",
    "psnr_high",
    "psnr_median",
    "ssim_mean",
    "ssim_low",
    "ssim_high",
    "ssim_median",
    "mse_mean",
    "mse_low",
    "mse_high",
    "mse_median",
    "null_class_mean_psnr",
    "null_class_mean_ssim",
    "null_class_mean_asr",
    "null_nearest_psnr",
    "null_nearest_ssim",
    "null_nearest_asr",
    "null_noise_psnr",
    "null_noise_ssim",
    "null_noise_asr",
    "gain_psnr",
    "gain_ssim",
]


def row(victim: int, position: int, ssim: float | None, status: str = "done", **more: Any) -> dict[str, Any]:
    done = status == "done"
    return {
        "seed": 0,
        "victim": victim,
        "position": position,
        "status": status,
        "psnr": None if not done or ssim is None else 10 + 20 * ssim,
        "ssim": ssim if done else None,
        "mse": None if not done or ssim is None else 1 - ssim,
        "label_correct": done or None,
        "legacy_ssim": 0.95 if done else None,
        "legacy_mse": 0.5 if done else None,
        "null_class_mean_psnr": 15.0,
        "null_class_mean_ssim": 0.5,
        "null_nearest_psnr": 18.0,
        "null_nearest_ssim": 0.92 if victim == 0 else 0.4,
        "null_noise_psnr": 8.0,
        "null_noise_ssim": 0.01,
        **more,
    }


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return summarize_cell(pd.DataFrame(rows), threshold=0.9, seed=0)


def test_the_columns_are_those_of_the_contract() -> None:
    assert list(summarize([row(0, 0, 0.95)])) == COLUMNS


def test_numbers_of_a_cell_in_which_everything_finished() -> None:
    values = [[0.95, 0.2], [0.91, 0.4], [0.3, 0.1], [0.99, 0.5]]
    cell = summarize([row(v, p, value) for v, pair in enumerate(values) for p, value in enumerate(pair)])
    flat = np.array(values).ravel()
    assert (cell["victims"], cell["images"], cell["done"], cell["failed"], cell["blocked"]) == (4, 8, 8, 0, 0)
    assert cell["complete"] is True
    assert cell["asr"] == pytest.approx(3 / 8)
    assert cell["ssim_mean"] == pytest.approx(flat.mean())
    assert cell["ssim_median"] == pytest.approx(np.median(flat))
    assert cell["psnr_mean"] == pytest.approx(10 + 20 * flat.mean())
    assert cell["mse_mean"] == pytest.approx(1 - flat.mean())
    for name in ("asr", "ssim", "psnr", "mse"):
        mean = cell["asr" if name == "asr" else f"{name}_mean"]
        assert cell[f"{name}_low"] < mean < cell[f"{name}_high"]
    assert cell["gain_psnr"] == pytest.approx(cell["psnr_mean"] - 18.0)
    assert cell["null_nearest_ssim"] == pytest.approx((0.92 * 2 + 0.4 * 6) / 8)
    assert cell["gain_ssim"] == pytest.approx(cell["ssim_mean"] - cell["null_nearest_ssim"])
    assert (cell["null_class_mean_asr"], cell["null_nearest_asr"], cell["null_noise_asr"]) == (0.0, 0.25, 0.0)


def test_failed_and_blocked_images_lower_the_success_rate_and_leave_the_means_alone() -> None:
    finished = [row(0, 0, 0.95), row(1, 0, 0.85)]
    failed = row(2, 0, None, "failed", null_nearest_psnr=40.0)
    blocked = row(3, 0, None, "blocked")
    cell = summarize([*finished, failed, blocked])
    alone = summarize(finished)
    assert (cell["done"], cell["failed"], cell["blocked"], cell["images"], cell["victims"]) == (2, 1, 1, 4, 4)
    assert cell["complete"] is False
    assert alone["complete"] is True
    assert cell["asr"] == 0.25
    assert alone["asr"] == 0.5
    for name in ("psnr_mean", "ssim_mean", "mse_median", "null_nearest_psnr", "gain_psnr", "gain_ssim", "ssim_low"):
        assert cell[name] == pytest.approx(alone[name])
    assert cell["null_nearest_asr"] == 0.25


def test_a_failed_row_with_a_stray_value_is_never_a_success() -> None:
    stray = {**row(1, 0, None, "failed"), "ssim": 0.99, "psnr": 50.0}
    cell = summarize([row(0, 0, 0.2), stray])
    assert cell["asr"] == 0.0
    assert cell["psnr_mean"] == pytest.approx(14.0)


def test_no_success_in_sixteen_victims_does_not_read_as_impossible() -> None:
    cell = summarize([row(victim, 0, 0.3) for victim in range(16)])
    assert (cell["asr"], cell["asr_low"]) == (0.0, 0.0)
    assert cell["asr_high"] == pytest.approx(1 - 0.025 ** (1 / 16))


def test_nothing_finished_leaves_means_empty() -> None:
    cell = summarize([row(0, 0, None, "failed"), row(1, 0, None, "failed")])
    assert (cell["asr"], cell["failed"], cell["done"]) == (0.0, 2, 0)
    for name in ("psnr_mean", "ssim_low", "mse_high", "psnr_median", "gain_psnr", "gain_ssim", "null_nearest_psnr"):
        assert cell[name] is None
    assert cell["null_nearest_asr"] == 0.5


def test_columns_that_no_row_has_count_as_empty() -> None:
    bare = pd.DataFrame([{"seed": 0, "victim": victim, "status": "failed"} for victim in range(3)])
    cell = summarize_cell(bare, threshold=0.9, seed=0)
    assert (cell["failed"], cell["asr"], cell["psnr_mean"], cell["null_noise_asr"]) == (3, 0.0, None, None)
    assert supplement_cell(bare, threshold=0.9) == {
        "label_accuracy": None,
        "mask_dice_mean": None,
        "legacy_asr": 0.0,
        "legacy_ssim_mean": None,
        "legacy_mse_mean": None,
    }


@pytest.mark.parametrize("rows", [pd.DataFrame([row(0, 0, 0.5)])[:0], pd.DataFrame([])])
def test_no_rows_at_all(rows: pd.DataFrame) -> None:
    cell = summarize_cell(rows, threshold=0.9, seed=0)
    assert (cell["images"], cell["victims"], cell["complete"], cell["asr"], cell["psnr_mean"]) == (
        0,
        0,
        False,
        None,
        None,
    )


def test_one_victim_has_a_mean_and_no_interval() -> None:
    cell = summarize([row(0, 0, 0.5), row(0, 1, 0.7)])
    assert cell["ssim_mean"] == pytest.approx(0.6)
    assert (cell["ssim_low"], cell["ssim_high"], cell["asr_low"], cell["asr_high"]) == (None,) * 4


def test_seeds_have_their_own_victims() -> None:
    cell = summarize([row(0, 0, 0.5), row(0, 0, 0.7, seed=1)])
    assert cell["victims"] == 2
    assert cell["ssim_low"] == pytest.approx(0.5)


def test_an_empty_null_part_leaves_its_columns_empty_and_noise_is_the_best_null() -> None:
    missing = ("null_class_mean_psnr", "null_class_mean_ssim", "null_nearest_psnr", "null_nearest_ssim")
    rows = pd.DataFrame([row(0, 0, 0.5), row(1, 0, 0.6)]).drop(columns=list(missing))
    cell = summarize_cell(rows, threshold=0.9, seed=0)
    assert list(cell) == COLUMNS
    assert (cell["null_class_mean_psnr"], cell["null_nearest_asr"]) == (None, None)
    assert cell["gain_ssim"] == pytest.approx(0.55 - 0.01)


def test_the_threshold_is_the_given_one() -> None:
    rows = pd.DataFrame([row(0, 0, 0.85), row(1, 0, 0.95)])
    assert summarize_cell(rows, threshold=0.8, seed=0)["asr"] == 1.0
    assert summarize_cell(rows, threshold=0.95, seed=0)["asr"] == 0.5
    assert summarize_cell(rows, threshold=0.4, seed=0)["null_class_mean_asr"] == 1.0


def test_rows_read_back_from_csv_give_the_same_numbers() -> None:
    rows = pd.DataFrame([row(0, 0, 0.95), row(1, 0, 0.5), row(2, 0, None, "failed")])
    rows["label_correct"] = ["true", "false", ""]
    text = rows.to_csv(index=False)
    again = pd.read_csv(io.StringIO(text))
    strings = pd.read_csv(io.StringIO(text), keep_default_na=False, dtype=str).replace("", None)
    expected = summarize_cell(rows, threshold=0.9, seed=0)
    assert summarize_cell(again, threshold=0.9, seed=0) == expected
    assert summarize_cell(strings, threshold=0.9, seed=0) == expected
    for frame in (rows, again, strings):
        assert supplement_cell(frame, threshold=0.9)["label_accuracy"] == 0.5


def test_supplement_reports_labels_and_the_papers_conventions() -> None:
    rows = [row(0, 0, 0.1), row(1, 0, 0.2, legacy_ssim=0.5), row(2, 0, None, "failed")]
    extra = supplement_cell(pd.DataFrame(rows), threshold=0.9)
    assert extra["label_accuracy"] == 1.0
    assert extra["legacy_asr"] == pytest.approx(1 / 3)
    assert extra["legacy_ssim_mean"] == pytest.approx(0.725)
    assert extra["legacy_mse_mean"] == pytest.approx(0.5)
    rows[0]["legacy_ssim"] = None
    assert supplement_cell(pd.DataFrame(rows), threshold=0.9)["legacy_ssim_mean"] is None
    rows[0]["label_correct"] = rows[1]["label_correct"] = None
    assert supplement_cell(pd.DataFrame(rows), threshold=0.9)["label_accuracy"] is None

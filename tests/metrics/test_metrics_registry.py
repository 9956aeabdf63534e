"""What `medpfl list metrics` and `medpfl describe metrics NAME` can say."""

from __future__ import annotations

import pytest

from medpfl.core.errors import SpecError
from medpfl.metrics import METRICS


def test_the_metrics_of_the_result_tables_are_described() -> None:
    expected = {"psnr", "ssim", "mse", "asr", "label_accuracy", "gain_psnr", "gain_ssim", "legacy_ssim", "legacy_mse"}
    expected |= {"utility_balanced_accuracy", "utility_auc"}
    assert expected <= set(METRICS.names())
    assert METRICS["psnr"].item.leak == "higher"
    assert METRICS["mse"].item.leak == "lower"
    assert METRICS["asr"].item.level == "cell"


def test_an_unknown_metric_suggests_the_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean 'psnr'"):
        METRICS["pnsr"]

"""Output folders as a run leaves them, including unfinished, old and damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from medpfl.core.errors import StoreError
from medpfl.report.loading import load_audit
from medpfl.report.views import Measured


def test_reads_what_the_tables_say(example_folder: Path) -> None:
    audit = load_audit(example_folder)
    table = pd.read_csv(example_folder / "cells.csv")
    assert audit.datasets == ("brain", "skin")
    assert len(audit.cells) == len(table) == 14
    first, row = audit.cells[0], table.iloc[0]
    assert (first.psnr.value, first.psnr.low, first.psnr.high) == (row["psnr_mean"], row["psnr_low"], row["psnr_high"])
    assert first.nulls["nearest"].ssim == row["null_nearest_ssim"]
    assert first.params["recipe"]["batch_size"] == 1
    assert [result.victim for result in first.results] == [str(i) for i in range(6)]
    assert audit.limit_text == "asr <= 0.05"
    assert audit.limit_holds is False
    assert audit.finished is True


def test_successes_evaluations_seconds_and_labels_are_counted_from_the_rows(
    make_audit: Callable[..., Path], make_spec: Callable[..., Any]
) -> None:
    folder = make_audit([make_spec(noise=0.02, images=2, failed={1: "broke"})], victims=3)
    cell = load_audit(folder).cells[0]
    rows = pd.read_csv(folder / "results.csv")
    assert cell.successes == int(rows["success"].astype(str).str.lower().eq("true").sum())
    assert cell.evaluations == 600
    assert cell.seconds == pytest.approx(4.5)
    assert cell.label_accuracy == 1.0
    assert cell.cases("failed") == 1
    assert cell.failed == 2


def test_ids_that_look_like_missing_values_or_numbers_stay_text(
    make_audit: Callable[..., Path], make_spec: Callable[..., Any]
) -> None:
    cell = load_audit(make_audit([make_spec(dataset="NA", attack="1e3", defense="null")], victims=1)).cells[0]
    assert (cell.dataset, cell.attack, cell.defense) == ("NA", "1e3", "null")


def test_a_folder_that_only_began_is_read(make_audit: Callable[..., Path], make_spec: Callable[..., Any]) -> None:
    folder = make_audit([make_spec()], victims=1, summary={"finished": False})
    for name in ("results.csv", "spec.yaml", "cells.csv"):
        (folder / name).unlink()
    audit = load_audit(folder)
    assert audit.cells == ()
    assert audit.spec_text == ""
    assert not audit.finished


def test_without_summary_the_counts_come_from_the_tables(
    make_audit: Callable[..., Path], make_spec: Callable[..., Any]
) -> None:
    folder = make_audit(
        [make_spec(failed={0: "broke"}, images=2), make_spec(status="refused", attack="cpl")], victims=3
    )
    (folder / "summary.json").unlink()
    audit = load_audit(folder)
    counted = [audit.count(name) for name in ("cells", "refused", "cases", "done", "failed", "blocked")]
    assert counted == [2, 1, 3, 2, 1, 0]
    assert audit.name == "audit"
    assert audit.threshold == 0.9


def test_missing_columns_and_values_are_none(make_audit: Callable[..., Path], make_spec: Callable[..., Any]) -> None:
    folder = make_audit([make_spec()], victims=2)
    cells = pd.read_csv(folder / "cells.csv", dtype=str)
    cells["gain_psnr"] = "nan"
    dropped = [name for name in cells if name.startswith(("null_", "ssim_", "guard", "recipe_params"))]
    cells.drop(columns=dropped).to_csv(folder / "cells.csv", index=False)
    cell = load_audit(folder).cells[0]
    assert cell.nulls == {}
    assert cell.best_null is None
    assert cell.gain_psnr is None
    assert cell.ssim == Measured()
    assert cell.params["recipe"] == {}


def test_summary_of_unexpected_shapes_is_tolerated(
    make_audit: Callable[..., Path], make_spec: Callable[..., Any]
) -> None:
    folder = make_audit([make_spec()], victims=1)
    strange = {"limit": "asr", "counts": [1], "data": {"a": 1}, "warnings": [{"text": "w"}, "w", None, 3], "plan": None}
    (folder / "summary.json").write_text(json.dumps(strange), encoding="utf-8")
    audit = load_audit(folder)
    assert audit.warnings == ("w", "3")
    assert audit.limit_text == ""
    assert audit.data == ()


def test_a_missing_folder_and_an_unrelated_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such folder"):
        load_audit(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"neither cells\.csv nor summary\.json.*medpfl audit"):
        load_audit(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", b"{not json"),
        ("cells.csv", b'cell,dataset\n"never closed'),
        ("cells.csv", b"cell\n\xff\xfe\x00bad"),
        ("results.csv", b"a,b\n1,2\n1,2,3\n"),
        ("spec.yaml", b"\xff\xfe\xff"),
    ],
)
def test_a_damaged_file_is_named(
    make_audit: Callable[..., Path], make_spec: Callable[..., Any], name: str, content: bytes
) -> None:
    folder = make_audit([make_spec()], victims=1)
    (folder / name).write_bytes(content)
    with pytest.raises(StoreError, match=name):
        load_audit(folder)

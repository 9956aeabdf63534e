"""Curves, pictures, the table of cells, failures and redaction, each on its own."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from medpfl.report import settings
from medpfl.report.curves import DECIBELS, THRESHOLDS, columns, panels
from medpfl.report.figures import success_svg
from medpfl.report.formatting import DASH
from medpfl.report.gallery import chosen_victims, gallery, picture
from medpfl.report.loading import load_audit
from medpfl.report.problems import failure_groups, refusal_groups, silent_groups
from medpfl.report.redaction import REMOVED, WITHHELD, without_items
from medpfl.report.table import cell_table
from medpfl.report.views import Audit, Cell, ImageResult, Measured, Null

MakeAudit = Callable[..., Path]
MakeSpec = Callable[..., Any]


def row(victim: int, ssim: float | None, **changes: Any) -> ImageResult:
    """One image of a victim of its own."""
    given = ImageResult(
        f"c/v{victim}", "c", "0", str(victim), "0", 0, f"item{victim}.png", "done", "",
        success=(ssim or 0) >= 0.9, ssim=ssim, psnr=20.0,
    )  # fmt: skip
    return replace(given, **changes)


def axes(**changes: str) -> dict[str, str]:
    """Ids of a cell's entries."""
    given = dict.fromkeys(("dataset", "model", "recipe", "threat_model"), "x")
    return {**given, "channel": "plain", "defense": "none", "guard": "none", "attack": "dlg", **changes}


def test_a_curve_counts_failed_images_and_meets_the_stored_rate() -> None:
    results = (row(0, 0.95), row(1, 0.5), row(2, 0.99, status="failed", success=False), row(3, 0.9))
    panel = panels([Cell("c", axes(), results=results)], 0.9)[0]
    by_hand = dict(zip(columns(0.9), panel.lines[0].at, strict=True))
    assert by_hand == {0.5: 0.75, 0.7: 0.5, 0.8: 0.5, 0.9: 0.5, 0.95: 0.25}
    assert panel.lines[0].values[0] == 0.75
    assert panel.lines[0].values[-1] == 0.0
    assert panel.images == 4


def test_decibels_stand_beside_the_curve_for_attack_and_nulls_alike() -> None:
    nulls = {"null_ssim": {"nearest": 0.5}, "null_psnr": {"nearest": 19.0}}
    results = (
        row(0, 0.95, psnr=30.0, **nulls),
        row(1, 0.9, psnr=99.0, status="failed", **nulls),
        row(2, 0.1, psnr=20.0),
    )
    panel = panels([Cell("c", axes(), results=results)], 0.9)[0]
    assert dict(zip(DECIBELS, panel.lines[0].decibels, strict=True)) == {18: 2 / 3, 25: 1 / 3, 30: 1 / 3, 40: 0}
    assert dict(zip(DECIBELS, panel.nulls[0].decibels, strict=True)) == {18: 1, 25: 0, 30: 0, 40: 0}


def test_the_recovery_rate_is_shown_with_its_nulls_where_anything_was_recovered() -> None:
    def column(rate: float) -> tuple[bool, str, str]:
        cell = Cell("c", axes(), recovered=Measured(rate, 0.2, 0.9), nulls={"noise": Null("noise", recovered=0.25)})
        table = cell_table([cell], 0.9)
        ((place, found),) = [(place, one) for place, one in enumerate(table.columns) if one.title == "Above 30 dB"]
        return found.essential, table.rows[0][place].text, table.rows[0][place].note

    essential, text, note = column(0.5)
    assert essential
    assert text == "50%"
    assert "nulls 25%" in note
    assert not column(0.0)[0]


def test_the_audits_own_threshold_is_written_out() -> None:
    assert 0.66 in columns(0.66)
    assert columns(0.8) == columns(0.9)


def test_null_curves_come_from_the_rows_or_else_from_the_cell(make_audit: MakeAudit, make_spec: MakeSpec) -> None:
    cell = load_audit(make_audit([make_spec()], victims=4)).cells[0]
    nearest = {mark.name: mark for mark in panels([cell], 0.9)[0].nulls}["nearest"]
    scores = np.array([result.null_ssim["nearest"] for result in cell.results])
    assert nearest.values is not None
    assert np.allclose(nearest.values, [(scores >= threshold).mean() for threshold in THRESHOLDS])
    bare = replace(cell, results=tuple(replace(result, null_ssim={}) for result in cell.results))
    nearest = {mark.name: mark for mark in panels([bare], 0.9)[0].nulls}["nearest"]
    assert nearest.values is None
    assert nearest.rate == cell.nulls["nearest"].asr


def test_panels_are_small_multiples_by_setting_then_attack() -> None:
    cells = [
        Cell("c", axes(model=model, attack=attack, defense=f"d{number}"), results=(row(0, 0.5),))
        for model in ("m1", "m2")
        for attack in ("dlg", "cpl")
        for number in range(5)
    ]
    found = panels(cells, 0.9)
    assert [panel.title for panel in found] == ["dlg, m1", "cpl, m1", "dlg, m2", "cpl, m2"]
    assert [line.label for line in found[0].lines] == ["d0", "d1", "d2", "d3", "d4"]
    many = [Cell("c", axes(defense=f"d{number}"), results=(row(0, 0.5),)) for number in range(10)]
    assert [len(panel.lines) for panel in panels(many, 0.9)] == [8, 2]
    assert panels([Cell("c", axes(), status="refused")], 0.9) == ()


def test_the_drawing_is_one_svg_without_outside_references_or_raw_labels(hostile: str) -> None:
    cells = [Cell("c", axes(defense=hostile), results=(row(0, 0.5), row(1, 0.95)))]
    svg = success_svg(panels(cells, 0.9)[0], 0.9, "p1", f"Curves of {hostile}")
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == f"Curves of {hostile}"
    assert "http" not in svg
    assert "<style" not in svg
    found = {element.get("id") for element in root.iter() if element.get("id")}
    assert found
    assert all(name is not None and name.startswith("p1-") for name in found)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    assert used <= found
    assert "SSIM threshold" in "".join(root.itertext())


def test_best_median_and_worst_victims_are_chosen_by_mean_ssim() -> None:
    several = [row(0, 0.2), row(1, 0.9), row(2, 0.5), row(3, 0.7), row(4, None, status="failed")]
    several += [row(5, 0.1), replace(row(5, 0.7), position=1)]
    chosen = chosen_victims(Cell("c", {}, results=tuple(several)))
    assert [(exhibit.rank, exhibit.victim) for exhibit in chosen] == [
        ("Best of 5 victims", "1"),
        ("Median victim", "2"),
        ("Worst victim", "0"),
    ]
    assert [exhibit.rank for exhibit in chosen_victims(Cell("c", {}, results=(row(0, 0.5),)))] == ["The only victim"]
    assert len(chosen_victims(Cell("c", {}, results=(row(0, 0.5), row(1, 0.6))))) == 2
    assert chosen_victims(Cell("c", {}, results=(row(0, None, status="failed"),))) == ()


def test_a_picture_is_inlined_as_it_is_and_enlarged_by_whole_factors(tmp_path: Path) -> None:
    pixels = np.arange(28 * 20, dtype=np.uint8).reshape(28, 20)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    shown, used = picture(tmp_path, "a.png", 10**6)
    prefix = "data:image/png;base64,"
    assert shown.uri.startswith(prefix)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(shown.uri[len(prefix) :])))), pixels)
    assert (shown.width, shown.height, shown.pixelated) == (20 * 6, 28 * 6, True)
    assert used == len(shown.uri)
    Image.fromarray(np.zeros((300, 400), np.uint8)).save(tmp_path / "large.png")
    large, _ = picture(tmp_path, "large.png", 10**6)
    assert (large.width, large.height, large.pixelated) == (400, 300, False)


def test_pictures_that_cannot_be_shown_say_why(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "text.png").write_text("<svg onload=alert(1)>")
    for relative, reason in (
        ("", "not stored"),
        ("../secret.png", "lies outside the output folder"),
        (str(tmp_path / "secret.png"), "lies outside the output folder"),
        ("link.png", "lies outside the output folder"),
        ("gone.png", "file is missing"),
        (".", "file is missing"),
        ("text.png", "file is not a PNG"),
    ):
        shown, used = picture(folder, relative, 10**6)
        assert (shown.uri, shown.missing, used) == ("", reason, 0)


def test_the_budget_keeps_the_best_victims_of_all_cells_and_counts_the_rest(
    make_audit: MakeAudit, make_spec: MakeSpec
) -> None:
    folder = make_audit([make_spec(), make_spec(attack="cpl")], victims=5)
    cells = load_audit(folder).cells
    everything = gallery(cells, folder)
    assert everything.left_out == 0
    best = sum(
        len(shown.uri)
        for entry in everything.cells
        for pair in entry.exhibits[0].pairs
        for shown in (pair.truth, pair.reconstruction)
    )
    tight = gallery(cells, folder, budget=best + 100)
    assert tight.left_out == 8
    for entry in tight.cells:
        assert all(pair.truth.uri and pair.reconstruction.uri for pair in entry.exhibits[0].pairs)
        assert all("left out" in pair.truth.missing for exhibit in entry.exhibits[1:] for pair in exhibit.pairs)


def test_large_victims_show_some_images_and_tell_the_rest(make_audit: MakeAudit, make_spec: MakeSpec) -> None:
    folder = make_audit([make_spec(images=10)], victims=1)
    exhibit = gallery(load_audit(folder).cells, folder).cells[0].exhibits[0]
    assert (len(exhibit.pairs), exhibit.more) == (8, 2)


def test_the_table_dashes_what_is_missing_and_sorts_it_last() -> None:
    measured = Cell("a", axes(), victims=2, asr=Measured(0.5, 0.1, 0.9), psnr=Measured(20.0, 19.0, 21.0))
    refused = Cell("b", axes(attack="cpl"), status="refused", reason="not possible")
    table = cell_table([measured, refused], 0.9)
    titles = [column.title for column in table.columns]
    psnr = titles.index("PSNR")
    assert [(found[psnr].text, found[psnr].sort, found[psnr].note) for found in table.rows] == [
        ("20.0", 20.0, "19.0 to 21.0"),
        (DASH, None, ""),
    ]
    status = titles.index("Status")
    assert (table.rows[1][status].text, table.rows[1][status].note) == ("refused", "not possible")
    assert table.rows[1][titles.index("Victims")].text == DASH
    assert {choice.title: choice.values for choice in table.filters} == {
        "Attack": ("cpl", "dlg"),
        "Status": ("done", "refused"),
    }
    assert ("Defense", "none") in table.constant


def test_oracle_and_informed_results_are_marked_in_the_essential_columns() -> None:
    cell = Cell("a", axes(), oracle=("batch_norm_statistics", "labels"), adaptive=True)
    table = cell_table([cell], 0.9)
    essential = " ".join(
        f"{value.text} {value.note}"
        for column, value in zip(table.columns, table.rows[0], strict=True)
        if column.essential
    )
    assert "oracle: batch norm statistics, labels" in essential
    assert "knows the defense" in essential


def test_utility_has_columns_where_it_was_measured() -> None:
    bare = cell_table([Cell("a", axes())], 0.9)
    assert "AUC" not in [column.title for column in bare.columns]
    measured = cell_table([Cell("a", axes(), utility={"utility_auc": Measured(0.91, 0.9, 0.92)})], 0.9)
    assert measured.columns[-1].title == "AUC"
    assert measured.rows[0][-1].text == "0.91"


def test_what_a_client_sends_stands_beside_each_defense_where_defenses_differ_in_it() -> None:
    alike = cell_table([Cell(name, axes(defense=name), bytes_sent=56896.0) for name in ("none", "laplace")], 0.9)
    (column,) = [one for one in alike.columns if one.title == "Bytes sent"]
    assert not column.essential
    sent = {"none": 56896.0, "sign": 1821.0}
    apart = cell_table([Cell(name, axes(defense=name), bytes_sent=count) for name, count in sent.items()], 0.9)
    place = next(place for place, one in enumerate(apart.columns) if one.title == "Bytes sent")
    assert apart.columns[place].essential
    assert {row[place].text for row in apart.rows} == {"56,896", "1,821"}


def test_failures_are_grouped_by_reason_and_counted_as_cases() -> None:
    broken = [row(0, None, status="failed", reason="diverged"), row(1, None, status="failed", reason="no memory")]
    broken += [
        row(0, None, status="failed", reason="diverged", position=1),
        row(2, None, status="failed", reason="diverged"),
    ]
    blocked = [row(3, None, status="blocked", reason="")]
    found = failure_groups([Cell("c", axes(), results=(*broken, *blocked, row(4, 0.5)))])
    assert [(group.status, group.reason, len(group.cases)) for group in found] == [
        ("failed", "diverged", 2),
        ("failed", "no memory", 1),
        ("blocked", "no reason was stored", 1),
    ]
    refused = [Cell(str(i), axes(), status="refused", reason=reason) for i, reason in enumerate("abb")]
    assert [(group.reason, len(group.cells)) for group in refusal_groups(refused)] == [("b", 2), ("a", 1)]


def test_cases_for_which_nothing_came_back_are_told_with_their_reason_and_are_no_failures() -> None:
    silent = [row(n, 0.1, fallback=True, stop_reason="nothing came back: no unit was active") for n in range(2)]
    partly = [row(2, 0.1, fallback=True), row(2, 0.9, position=1)]
    cell = Cell("c", axes(), results=(*silent, *partly))
    assert failure_groups([cell]) == ()
    (group,) = silent_groups([cell])
    assert (group.attack, group.reason, group.cases) == ("dlg", "no unit was active", ("c/v0", "c/v1"))


def test_redaction_removes_names_from_texts_and_leaves_everything_else() -> None:
    result = row(0, 0.5, item="glioma/anna.png", reason="cannot decode anna.png (0 of 3)", truth_image="images/t.png")
    other = row(1, 0.5, item="7", reason="stopped after 7 of 17 steps")
    params = {"model": {"name": "resnet18", "state": "../ward7/global.safetensors"}, "dataset": {"path": "../ward7"}}
    audit = Audit(
        "a",
        cells=(Cell("c", axes(), params, reason="glioma/anna.png is too small", results=(result, other)),),
        warnings=("glioma/anna.png looks like glioma/annabel.png",),
        data=({"dataset": "x", "images": 7, "notes": ["left out anna.png", 7]},),
        spec_text="data:\n- name: x\n  path: ../ward7/scans\nmodels:\n- state: ../ward7/global.safetensors\n",
    )
    cleaned = without_items(audit)
    first, second = cleaned.cells[0].results
    assert (first.item, first.truth_image, first.reconstruction_image, second.item) == ("", "", "", "")
    assert first.reason == f"cannot decode {REMOVED} (0 of 3)"
    assert second.reason == "stopped after 7 of 17 steps"
    assert cleaned.cells[0].params["model"] == {"name": "resnet18", "state": f"{WITHHELD}/global.safetensors"}
    assert cleaned.cells[0].params["dataset"] == {"path": WITHHELD}
    assert cleaned.cells[0].reason == f"{REMOVED} is too small"
    assert cleaned.warnings == (f"{REMOVED} looks like glioma/annabel.png",)
    assert cleaned.data[0] == {"dataset": "x", "images": 7, "notes": [f"left out {REMOVED}", 7]}
    assert yaml.safe_load(cleaned.spec_text) == {
        "data": [{"name": "x", "path": WITHHELD}],
        "models": [{"state": f"{WITHHELD}/global.safetensors"}],
    }
    assert (first.ssim, first.psnr, first.case) == (result.ssim, result.psnr, result.case)


@pytest.mark.parametrize("item", ["scan (1).png", "a+b.png", "über.png", "file.npz#train/3"])
def test_redaction_takes_names_literally(item: str) -> None:
    audit = Audit("a", cells=(Cell("c", axes(), results=(row(0, 0.5, item=item, reason=f"bad: {item}."),)),))
    assert without_items(audit).cells[0].results[0].reason == f"bad: {REMOVED}."


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("untrained_per_victim", "untrained, with new weights for every victim"),
        ("imagenet", "with weights from ImageNet, never trained on medical images"),
        ("/home/someone/secret/site_a.safetensors", "from the checkpoint site_a.safetensors"),
        ("C:\\models\\site_a.pt", "from the checkpoint site_a.pt"),
        ({"trained": {"epochs": 1, "victims": "included"}}, "trained for 1 epoch, victims included"),
        (None, ""),
    ],
)
def test_model_state_tells_no_folder(state: Any, expected: str) -> None:
    assert settings.model_state({"state": state}) == expected

"""`list`, `describe`, `init`, `show`, `compare` and `export`, as a user runs them."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import Result
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from medpfl.audit.spec import load_spec
from medpfl.cli import compare, export, init, listing, show
from medpfl.core.errors import InputError

app = Typer(rich_markup_mode=None)
for module in (listing, init, show, compare, export):
    module.register(app)

CELL = "brain/lenet_dlg/gradient-b1/eavesdropper/plain/none/none/dlg"
REFUSED = "brain/lenet_dlg/gradient-b1/eavesdropper/plain/none/none/gradinv"
ITEM = "glioma/miller_anna_{}.png"


def run(*arguments: object) -> Result:
    """Runs a command; its exit code is 0."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    assert result.exit_code == 0
    return result


def write_png(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def audit_folder(folder: Path, psnr: tuple[float, ...] = (20.0, 30.0), *, cells: tuple[str, ...] = (CELL,)) -> Path:
    """An output folder with one image per victim; the last victim failed."""
    folder.mkdir()
    rows: list[dict[str, Any]] = []
    for cell in cells:
        for victim, value in enumerate((*psnr, None)):
            row: dict[str, Any] = {"case": f"{cell}/s0/v{victim}", "cell": cell, "seed": 0, "dataset": "brain"}
            row |= {"attack": cell.rpartition("/")[2], "victim": victim, "client": 0, "position": 0}
            row |= {"item": ITEM.format(victim), "status": "done", "success": "false", "notes": ITEM.format(victim)}
            if value is None:
                row |= {"status": "failed", "reason": f"no inverse for {ITEM.format(victim)} in /secret/scans"}
            else:
                row |= {"psnr": value, "ssim": value / 100, "mse": 0.01, "success": str(value >= 30).lower()}
                row |= {"objective": 0.125, "gradient_evaluations": 77, "stop_reason": "iterations"}
                row |= {"null_nearest_psnr": 12.5, "null_nearest_ssim": 0.5}
                row |= {"truth_image": f"images/t{victim}.png", "reconstruction_image": f"images/r{victim}.png"}
                write_png(folder / f"images/t{victim}.png", np.full((4, 4), 255))
                write_png(folder / f"images/r{victim}.png", np.full((4, 4), 16))
            rows.append(row)
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
    params = json.dumps({"reader": "folder", "path": "/secret/scans", "size": 32})
    table = [{"cell": cell, "dataset": "brain", "dataset_params": params, "status": "done"} for cell in cells]
    table.append({"cell": REFUSED, "dataset": "brain", "dataset_params": params, "status": "refused"})
    pd.DataFrame(table).to_csv(folder / "cells.csv", index=False)
    summary = {"name": "a", "threshold": 0.9, "finished": True, "warnings": [f"{ITEM.format(0)} in /secret/scans"]}
    (folder / "summary.json").write_text(json.dumps(summary))
    spec = {"name": "a", "data": [{"name": "brain", "reader": "folder", "path": "/secret/scans", "size": 32}]}
    (folder / "spec.yaml").write_text("# anna\n" + yaml.safe_dump(spec))
    (folder / "audit.sqlite").write_bytes(b"store")
    return folder


@pytest.mark.parametrize("kind", [*listing.REGISTRIES, "knowledge"])
def test_everything_listed_can_be_described(kind: str) -> None:
    listed = json.loads(run("list", kind, "--json").stdout)
    assert listed
    for entry in listed:
        assert entry["name"] in run("list", kind).stdout
        described = json.loads(run("describe", kind, entry["name"], "--json").stdout)
        assert described["summary"] == entry["summary"] != ""
        assert all(parameter["description"] for parameter in described["parameters"])
        assert entry["name"] in run("describe", kind, entry["name"]).stdout


def test_describe_says_what_an_attack_needs() -> None:
    described = json.loads(run("describe", "attacks", "gradinv", "--json").stdout)
    parameters = {row["name"]: row for row in described["parameters"]}
    assert parameters["iterations"]["default"] == "1000"
    assert parameters["iterations"]["type"] == "int, >= 1"
    assert parameters["labels"]["type"] == "inferred | given"
    assert described["knowledge"]["requires"] == []
    assert {preset["name"]: preset["requires"] for preset in described["presets"]}["published"] == ["labels"]
    text = run("describe", "attacks", "gradinv").stdout
    assert "Geiping" in text
    assert "Required knowledge: none" in text


def test_readers_say_which_settings_must_be_given() -> None:
    described = json.loads(run("describe", "readers", "folder", "--json").stdout)
    assert next(row for row in described["parameters"] if row["name"] == "path")["default"] is None
    assert "(needed)" in run("describe", "readers", "folder").stdout


def test_guards_are_listed_and_say_when_they_look() -> None:
    names = [row["name"] for row in json.loads(run("list", "guards", "--json").stdout)]
    assert {"leakage_gate", "none", "norm_bound", "vetting"} <= set(names)
    gate = json.loads(run("describe", "guards", "leakage_gate", "--json").stdout)
    assert gate["facts"] == {"looks": ["at the update before it is sent"]}
    assert "gradient matching" in gate["limits"]
    assert "before training" in run("describe", "guards", "vetting").stdout
    with pytest.raises(InputError, match="did you mean 'leakage_gate'"):
        run("describe", "guards", "leakagegate")


def test_misspelled_names_get_a_suggestion() -> None:
    with pytest.raises(InputError, match="did you mean 'attacks'"):
        run("list", "atacks")
    with pytest.raises(InputError, match="did you mean 'gradinv'"):
        run("describe", "attacks", "gradin")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for number in range(4):
        write_png(tmp_path / f"my scans/{'ab'[number % 2]}/{number}.png", generator.integers(0, 255, (16, 16, 3)))
    return tmp_path / "my scans"


@pytest.mark.parametrize("model", ["lenet_dlg", "resnet18_cifar", "package.nets:small"])
def test_init_writes_a_spec_that_loads(
    images: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("init", "--data", "my scans", "--model", model, "--out", "specs/audit.yaml", "--size", 48)
    spec = load_spec(tmp_path / "specs" / "audit.yaml")
    (entry,) = spec.data
    assert (entry.id, entry.settings.size, entry.settings.channels) == ("my-scans", 48, 3)
    assert yaml.safe_load(Path("specs/audit.yaml").read_text())["data"][0]["path"] == "../my scans"
    assert entry.reader.class_names() == ("a", "b")
    assert spec.models[0].source == model
    assert "#" in Path("specs/audit.yaml").read_text()


def test_init_sees_that_color_files_are_gray_and_that_there_is_one_class(tmp_path: Path) -> None:
    write_png(tmp_path / "flat" / "1.png", np.full((16, 16, 3), 90))
    run("init", "--data", tmp_path / "flat", "--model", "lenet_dlg", "--out", tmp_path / "a.yaml")
    spec = load_spec(tmp_path / "a.yaml")
    assert spec.data[0].settings.channels == 1
    assert spec.models[0].classes == 2


def test_init_needs_no_data_for_phantoms(tmp_path: Path) -> None:
    run("init", "--reader", "phantom", "--model", "lenet_dlg", "--out", tmp_path / "a.yaml")
    assert load_spec(tmp_path / "a.yaml").data[0].id == "phantom"


def test_init_names_the_missing_option_without_a_terminal(images: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--data"):
        run("init", "--out", tmp_path / "a.yaml")
    with pytest.raises(InputError, match="--model"):
        run("init", "--data", images, "--out", tmp_path / "a.yaml")
    assert not (tmp_path / "a.yaml").exists()


def test_init_never_overwrites(images: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        run("init", "--data", images, "--model", "lenet_dlg", "--out", tmp_path / "a.yaml")
    assert (tmp_path / "a.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "reader"),
    [("a.csv", "csv"), ("a.npz", "medmnist"), ("d/a.dcm", "dicom"), ("d/e/a.nii.gz", "nifti"), ("d/a.JPG", "folder")],
)
def test_the_reader_is_guessed(tmp_path: Path, name: str, reader: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert init.guess_reader(path) == reader
    if path.parent != tmp_path:
        assert init.guess_reader(tmp_path) == reader


def test_show_finds_a_case_by_a_part_of_its_id(tmp_path: Path) -> None:
    folder = audit_folder(tmp_path / "out")
    text = run("show", folder, "s0/v1").stdout
    for expected in (f"{CELL}/s0/v1", "objective: 0.125", "77", "stop reason: iterations", "12.5", "images/t1.png"):
        assert expected in text.replace("\n", "") if "/" in expected else expected in text
    assert "▀" not in text
    (row,) = json.loads(run("show", folder, "v1", "--json").stdout)
    assert (row["psnr"], row["success"], row["null_nearest_ssim"], row["victim"]) == (30.0, True, 0.5, 1)
    assert "no inverse" in run("show", folder, "v2", "--picture").stdout


def test_show_draws_truth_and_reconstruction_in_their_colors(tmp_path: Path) -> None:
    text = run("show", audit_folder(tmp_path / "out"), "v0", "--picture").stdout
    assert text.count("▀") == 2 * 4 * 2
    assert "38;2;255;255;255" in text
    assert "48;2;16;16;16" in text


def test_show_asks_for_more_where_several_cases_fit(tmp_path: Path) -> None:
    folder = audit_folder(tmp_path / "out")
    with pytest.raises(InputError, match="fits 3 cases"):
        run("show", folder, "lenet")
    with pytest.raises(InputError, match="no case 'v9'"):
        run("show", folder, "v9")


def test_show_opens_nothing_outside_the_folder(tmp_path: Path) -> None:
    folder = audit_folder(tmp_path / "out")
    write_png(tmp_path / "other.png", np.full((4, 4), 255))
    table = (folder / "results.csv").read_text().replace("images/t0.png", "../other.png")
    (folder / "results.csv").write_text(table)
    with pytest.raises(InputError, match="outside"):
        run("show", folder, "v0", "--picture")


def test_compare_pairs_images(tmp_path: Path) -> None:
    extra = CELL.replace("/dlg", "/cpl")
    first = audit_folder(tmp_path / "first", (20.0, 30.0))
    second = audit_folder(tmp_path / "second", (31.0, 35.0), cells=(CELL, extra))
    found = json.loads(run("compare", first, second, "--json").stdout)
    (cell,) = found["cells"]
    assert (cell["cell"], cell["images"], cell["victims"]) == (CELL, 3, 3)
    assert cell["psnr"]["mean"] == pytest.approx((11 + 5) / 2)
    assert 5 <= cell["psnr"]["low"] <= 8 <= cell["psnr"]["high"] <= 11
    assert cell["ssim"]["mean"] == pytest.approx(0.08)
    assert cell["success"]["mean"] == pytest.approx(1 / 3)
    assert found["only_second"] == [extra]
    assert found["only_first"] == []
    assert list(found["not_comparable"]) == [REFUSED]
    text = run("compare", first, second).stdout
    assert "+8.00" in text
    assert extra in text


def test_compare_refuses_to_pair_different_images(tmp_path: Path) -> None:
    first, second = audit_folder(tmp_path / "first"), audit_folder(tmp_path / "second")
    table = (second / "results.csv").read_text().replace("miller_anna_0", "smith_john")
    (second / "results.csv").write_text(table)
    found = json.loads(run("compare", first, second, "--json").stdout)
    assert found["cells"] == []
    assert "differ" in found["not_comparable"][CELL]


def test_an_export_without_images_names_nobody(tmp_path: Path) -> None:
    folder = audit_folder(tmp_path / "out")
    run("export", folder, "--without-images")
    copy = tmp_path / "out-export"
    names = {path.name for path in copy.rglob("*")}
    assert names == {"results.csv", "cells.csv", "summary.json", "spec.yaml", "report.html"}
    for path in copy.iterdir():
        text = path.read_text()
        for word in ("anna", "/secret", "images/t", "data:image/png"):
            assert word not in text, (path.name, word)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o700
    assert yaml.safe_load((copy / "spec.yaml").read_text())["data"][0]["path"] == "(withheld)"
    before, after = (pd.read_csv(place / "results.csv") for place in (folder, copy))
    kept = ["case", "cell", "psnr", "ssim", "success", "status"]
    pd.testing.assert_frame_equal(before[kept], after[kept])
    assert list(before.columns) == list(after.columns)
    assert after["item"].isna().all()


def test_an_export_with_images_has_them_and_not_the_store(tmp_path: Path) -> None:
    folder = audit_folder(tmp_path / "out")
    run("export", folder, "--to", tmp_path / "copy")
    assert (tmp_path / "copy/images/t0.png").read_bytes() == (folder / "images/t0.png").read_bytes()
    assert (tmp_path / "copy/report.html").exists()
    assert not (tmp_path / "copy/audit.sqlite").exists()


def test_an_export_replaces_nothing(tmp_path: Path) -> None:
    folder = audit_folder(tmp_path / "out")
    (tmp_path / "copy").mkdir()
    with pytest.raises(InputError, match="exists already"):
        run("export", folder, "--without-images", "--to", tmp_path / "copy")
    with pytest.raises(InputError, match="inside"):
        run("export", folder, "--without-images", "--to", folder / "copy")
    assert list((tmp_path / "copy").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"out", "copy"}


def test_an_export_withholds_where_the_data_lies_however_it_is_written(tmp_path: Path) -> None:
    folder = audit_folder(tmp_path / "out")
    for name in ("spec.yaml", "cells.csv"):
        (folder / name).write_text((folder / name).read_text().replace("/secret/scans", "../brain"))
    warnings = ["cannot read '/home/ward7/brain/x.dcm': no pixels", "a brain is not a path"]
    (folder / "summary.json").write_text(json.dumps({"name": "brain", "warnings": warnings}))
    run("export", folder, "--without-images")
    summary = json.loads((tmp_path / "out-export/summary.json").read_text())
    assert summary["warnings"] == ["cannot read '(withheld)': no pixels", "a brain is not a path"]
    assert summary["name"] == "brain"
    assert set(pd.read_csv(tmp_path / "out-export/cells.csv")["dataset"]) == {"brain"}


def test_init_writes_where_the_masks_lie(tmp_path: Path) -> None:
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (12, 12))
        write_png(tmp_path / "scans" / f"{index}.png", pixels)
        write_png(tmp_path / "drawn" / f"{index}.png", 255 * (pixels > 128))
    scans, drawn = tmp_path / "scans", tmp_path / "drawn"
    run("init", "--data", scans, "--masks", drawn, "--model", "unet_small", "--out", tmp_path / "a.yaml")
    spec = load_spec(tmp_path / "a.yaml")
    assert spec.data[0].reader.mask_names() == ("background", "foreground")
    assert spec.models[0].segments
    run("init", "--data", scans, "--masks", drawn, "--model", "nets:mine", "--out", tmp_path / "b.yaml")
    assert load_spec(tmp_path / "b.yaml").models[0].segments
    run("init", "--data", scans, "--model", "nets:mine", "--out", tmp_path / "c.yaml")
    assert not load_spec(tmp_path / "c.yaml").models[0].segments
    with pytest.raises(InputError, match="reader 'phantom' reads no masks"):
        run("init", "--reader", "phantom", "--masks", drawn, "--model", "unet_small", "--out", tmp_path / "d.yaml")


def test_describe_says_which_models_are_trained_with_masks() -> None:
    for name, targets in (("unet_small", "masks"), ("lenet_dlg", "labels")):
        assert listing.description("models", name)["facts"] == {"trained_with": targets}

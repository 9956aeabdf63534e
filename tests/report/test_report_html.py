"""The file itself: valid, self-contained, private, and the same whatever the texts in the data are."""

from __future__ import annotations

import base64
import hashlib
import re
import stat
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from medpfl.core.errors import StoreError
from medpfl.report import write_report

VOID = {"meta", "img", "input", "br", "hr", "link", "area", "base", "col", "embed", "source", "track", "wbr"}


class Page(HTMLParser):
    """Checks that tags balance, and collects what tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of all tags of that name."""
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        """What a reader reads, with single spaces."""
        return " ".join("".join(self.texts).split())


@pytest.fixture(scope="module")
def html(example_folder: Path) -> str:
    """The report of the example audit."""
    return write_report(example_folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    """The parsed report of the example audit."""
    return Page(html)


def test_the_page_is_well_formed_with_unique_ids_and_working_links(page: Page) -> None:
    ids = [value for _, attributes in page.tags if (value := attributes.get("id"))]
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    for link in page.all("a"):
        assert (link["href"] or "").startswith("#")
        assert (link["href"] or "")[1:] in ids
    for _, attributes in page.tags:
        for reference in ("aria-labelledby", "aria-controls"):
            assert set((attributes.get(reference) or "").split()) <= set(ids)
    assert page.all("html")[0]["lang"] == "en"
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))


def test_nothing_is_loaded_from_outside(html: str, page: Page) -> None:
    assert page.all("link") == page.all("iframe") == page.all("object") == []
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "xlink:href", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,"))
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert not re.search(r"\bhttps?:", html)


def test_only_its_own_script_may_run(html: str, page: Page) -> None:
    script = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    assert len(script) == len(page.all("script")) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_hostile_texts_appear_as_text_everywhere(html: str, page: Page, hostile: str) -> None:
    assert "<script>alert" not in html
    assert "{{ 7 * 7 }}" in page.text
    for start in (
        "laplace-100: noise without clipping has no privacy guarantee ",
        "Untrained ",
        "batch norm ",
        "singular matrix in ",
        "the first trainable layer of ",
        "name: ",
    ):
        assert f"{start}{hostile}" in page.text
    assert any(option.get("value") == hostile for option in page.all("option"))


def test_warnings_stand_beside_the_results_of_their_defense(page: Page, hostile: str) -> None:
    before_the_cells = page.text[: page.text.index("All cells")]
    assert before_the_cells.count(f"noise without clipping has no privacy guarantee {hostile}") == 2
    marks = [attributes for tag, attributes in page.tags if tag == "a" and "noted" in (attributes.get("class") or "")]
    targets = {attributes.get("id") for tag, attributes in page.tags if tag == "li"}
    assert marks
    assert all((mark.get("href") or "").removeprefix("#") in targets for mark in marks)


def test_every_image_has_an_alternative_text(page: Page) -> None:
    images = page.all("img")
    assert len(images) == 13 * 3 * 2 + 3 * 3  # pictures of all cells, and of one diagnosis
    assert all(
        (image.get("alt") or "").startswith(("Private image of victim", "Reconstruction by")) for image in images
    )
    for drawing in page.all("svg"):
        assert drawing.get("aria-hidden") == "true" or (drawing.get("role") == "img" and drawing.get("aria-label"))


def test_tables_have_captions_and_the_cells_can_be_sorted_from_the_keyboard(html: str, page: Page) -> None:
    assert len(page.all("caption")) == len(page.all("table"))
    head = html[html.index('<table id="cells-table"') :].split("</thead>")[0]
    assert head.count("<th ") == head.count("<button ") > 10
    assert head.count("aria-sort=") == 1


def test_missing_values_are_dashes(page: Page) -> None:
    assert not re.search(r"\b([Nn]a[Nn]|None|inf|undefined)\b", page.text)


def test_the_answer_comes_first_and_the_sections_follow_in_order(page: Page) -> None:
    order = [value for tag, attributes in page.tags if tag == "section" and (value := attributes.get("id"))]
    assert order == [
        "answer",
        "diagnosis",
        "cells",
        "curves",
        "pictures",
        "problems",
        "assumptions",
        "data",
        "reproduce",
    ]
    text = page.text
    assert text.index("Private images could be reconstructed") < text.index("All cells")
    for part in (
        "A low success rate is not safety.",
        "The limit asr <= 0.05 does not hold",
        "76 of 78 cases finished, 2 failed",
        "Knowing the labels, which a real adversary would not",
        "Attacked with knowledge of the defense by cpl-informed.",
        "Near duplicates left out",
        "2.13.0",
        "4 March 2026, 12:30 UTC",
    ):
        assert part in text


def test_the_file_is_private_and_written_at_once(example_folder: Path) -> None:
    path = write_report(example_folder)
    assert path == example_folder / "report.html"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in example_folder.iterdir() if "report" in entry.name] == ["report.html"]


def test_the_same_folder_gives_the_same_bytes(example_folder: Path) -> None:
    first = write_report(example_folder).read_bytes()
    assert write_report(example_folder).read_bytes() == first


def test_without_images_neither_pixels_nor_names_are_left(
    make_audit: Callable[..., Path], make_spec: Callable[..., Any]
) -> None:
    folder = make_audit(
        [make_spec(failed={1: "cannot decode glioma/patient_1_0.png: truncated"}), make_spec(attack="cpl")],
        victims=4,
        summary={
            "warnings": ["patient_2_0.png is flat"],
            "data": [{"dataset": "brain", "notes": "see patient_3_0.png"}],
        },
        spec_text="name: x  # not patient_0_0.png\n",
    )
    with_images = write_report(folder).read_text(encoding="utf-8")
    assert "patient_0_0.png" in with_images
    assert "base64" in with_images
    text = write_report(folder, images=False).read_text(encoding="utf-8")
    page = Page(text)
    assert page.all("img") == []
    for leak in ("base64", "data:image", "patient_", "glioma", "images/truth", ".png"):
        assert leak not in text
    assert "All private images and all item names were left out of this file." in page.text
    assert "cannot decode [item]: truncated" in page.text
    assert "Success curves" in page.text


@pytest.mark.parametrize(
    ("spec", "summary", "expected"),
    [
        ({"status": "refused", "reason": "no dense layer"}, {}, "Nothing was measured: every combination was refused"),
        (
            {"failed": {0: "diverged", 1: "diverged"}},
            {},
            "Every case that was tried failed, so nothing is known. A failed attack is not a weak one.",
        ),
        ({"blocked": {0: "vetting", 1: "vetting"}}, {}, "A guard stopped every case"),
        ({"status": "partial"}, {"finished": False}, "This audit is not complete"),
        ({"oracle": "labels"}, {}, "Only attacks with oracle knowledge finished"),
    ],
)
def test_unusual_audits_are_told_as_they_are(
    make_audit: Callable[..., Path],
    make_spec: Callable[..., Any],
    spec: dict[str, Any],
    summary: dict[str, Any],
    expected: str,
) -> None:
    folder = make_audit([make_spec(**spec)], victims=2, summary=summary)
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert expected in page.text
    assert not re.search(r"\bnan\b", page.text, flags=re.IGNORECASE)


@pytest.mark.parametrize(
    "missing", [["results.csv"], ["cells.csv"], ["summary.json"], ["spec.yaml"], ["results.csv", "cells.csv"]]
)
def test_missing_files_leave_a_report_that_says_less(
    make_audit: Callable[..., Path], make_spec: Callable[..., Any], missing: list[str]
) -> None:
    folder = make_audit([make_spec(), make_spec(defense="laplace-100")], victims=2)
    for name in missing:
        (folder / name).unlink()
    for images in (True, False):
        page = Page(write_report(folder, images=images).read_text(encoding="utf-8"))
        assert "The answer" in page.text


def test_a_guess_without_the_update_is_not_called_a_reconstruction(
    make_audit: Callable[..., Path], make_spec: Callable[..., Any]
) -> None:
    folder = make_audit([make_spec()], victims=1)
    table = pd.read_csv(folder / "results.csv", dtype=str, keep_default_na=False)
    table["candidate"], table["stop_reason"] = "", "nothing came back: no unit of <b> was active"
    table.to_csv(folder / "results.csv", index=False)
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "nothing came back: guess without the update" in page.text
    assert "dlg: no unit of <b> was active (1 case in 1 cell)" in page.text
    assert not any("Reconstruction by" in (image["alt"] or "") for image in page.all("img"))


def test_missing_images_are_told_and_the_rest_is_shown(
    make_audit: Callable[..., Path], make_spec: Callable[..., Any]
) -> None:
    folder = make_audit([make_spec()], victims=2)
    for path in folder.rglob("images/truth/**/*.png"):
        path.unlink()
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert len(page.all("img")) == 2
    assert "file is missing" in page.text


def test_an_unwritable_folder_is_one_clear_error(
    make_audit: Callable[..., Path], make_spec: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_audit([make_spec()], victims=1)

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StoreError, match=r"report\.html: cannot be written \(No space left on device\)"):
        write_report(folder)
    assert not [path for path in folder.iterdir() if "report" in path.name]

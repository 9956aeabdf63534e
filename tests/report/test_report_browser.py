"""The report in a real browser: it renders, sorts and filters, stays silent, and asks nobody for anything."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from medpfl.report import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install -e '.[dev]'")

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        if (path := shutil.which(name))
    ),
    None,
)
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
]


class Visit:
    """A page of the report with everything that it said and asked for."""

    def __init__(self, browser: Browser, report: Path, width: int, *, javascript: bool = True) -> None:
        self.console: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(
            offline=True, viewport={"width": width, "height": 800}, java_script_enabled=javascript
        )
        self.context.set_default_timeout(30000)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.console.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.console.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.console.append(f"dialog: {dialog.message}"))
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(report.as_uri())
        self.report = report

    def close(self) -> None:
        """Ends the visit; whatever was done in it, the page was silent and stayed within its file."""
        self.context.close()
        assert self.console == []
        outside = [
            url for url in self.requests if not url.startswith("data:") and url.split("#")[0] != self.report.as_uri()
        ]
        assert outside == []

    def column(self, title: str) -> list[str]:
        """The first line of a column's visible places, from top to bottom."""
        script = """(title) => {
            const table = document.getElementById("cells-table");
            const index = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent.trim() === title);
            return [...table.tBodies[0].rows].filter((row) => row.checkVisibility())
                .map((row) => (row.cells[index].firstChild.textContent).trim());
        }"""
        return [str(text) for text in self.page.evaluate(script, title)]

    def heading(self, title: str) -> Locator:
        """The sort button of a column."""
        return self.page.locator("#cells-table thead").get_by_role("button", name=title, exact=True)

    def choice(self, title: str) -> Locator:
        """A control above the table."""
        return self.page.get_by_role("group", name="Filter the cells").get_by_label(title, exact=True)

    def count(self) -> str:
        """What the live region says."""
        return str(self.page.locator("#cells-count").text_content())

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@pytest.fixture(scope="module")
def report(example_folder: Path) -> Path:
    """The report of the example audit."""
    return write_report(example_folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all visits."""
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: Browser, report: Path) -> Iterator[Visit]:
    """A visit at the width of a desktop."""
    opened = Visit(browser, report, 1280)
    yield opened
    opened.close()


def test_the_answer_the_curves_and_the_pictures_are_seen(visit: Visit, hostile: str) -> None:
    assert visit.page.title() == "brain and skin before go-live – reconstruction audit"
    assert visit.page.locator(".overall").is_visible()
    assert visit.page.get_by_text(hostile).first.is_visible()
    assert visit.page.locator(".chart > svg").first.bounding_box()["width"] > 200  # type: ignore[index]
    loaded = "[...document.images].filter((image) => image.checkVisibility()).map((image) => image.naturalWidth)"
    assert visit.page.evaluate(loaded) == [32] * 21


def test_numbers_sort_as_numbers_with_missing_ones_last(visit: Visit) -> None:
    def numbers() -> list[float]:
        found = visit.column("Gain")
        assert found[-1] == "–"
        return [float(text.replace("−", "-")) for text in found[:-1]]

    assert visit.column("Cell") == [str(i) for i in range(1, 15)]
    assert min(numbers()) < 0 < 10 < max(numbers())
    visit.heading("Gain").click()
    assert numbers() == sorted(numbers())
    visit.heading("Gain").click()
    assert numbers() == sorted(numbers(), reverse=True)
    sorted_by = visit.page.locator("#cells-table th[aria-sort]")
    assert sorted_by.count() == 1
    assert sorted_by.get_attribute("aria-sort") == "descending"
    assert "Gain" in str(sorted_by.text_content())
    visit.heading("Cell").click()
    assert visit.column("Cell") == [str(i) for i in range(1, 15)]


def test_sorting_works_from_the_keyboard(visit: Visit) -> None:
    button = visit.heading("Attack")
    button.focus()
    assert visit.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    visit.page.keyboard.press("Enter")
    ascending = visit.column("Attack")
    assert ascending == sorted(ascending)
    visit.page.keyboard.press("Space")
    assert visit.column("Attack") == sorted(ascending, reverse=True)
    visit.page.keyboard.press("Tab")
    assert visit.page.evaluate("document.activeElement.textContent") == "Defense"


def test_the_first_tab_reaches_the_skip_link(visit: Visit) -> None:
    visit.page.keyboard.press("Tab")
    assert visit.page.evaluate("document.activeElement.textContent") == "Skip to the answer"
    assert visit.page.locator(".skip").bounding_box()["x"] >= 0  # type: ignore[index]
    visit.page.keyboard.press("Enter")
    assert visit.page.evaluate("document.activeElement.id") == "answer"


def test_text_and_choices_filter_together(visit: Visit, hostile: str) -> None:
    text = visit.choice("Text")
    text.fill("SKIN laplace")
    assert visit.column("Data") == ["skin"] * 3
    assert set(visit.column("Defense")) == {"laplace-100"}
    assert visit.count() == "3 of 14 cells"
    visit.choice("Attack").select_option("dlg")
    assert visit.column("Attack") == ["dlg"]
    assert visit.count() == "1 of 14 cells"
    visit.page.get_by_role("button", name="Reset").click()
    assert visit.count() == "14 cells"
    assert len(visit.column("Cell")) == 14
    visit.choice("Defense").select_option(hostile)
    assert visit.column("Defense") == [hostile] * 2
    visit.choice("Defense").select_option("")
    text.fill("no such cell")
    assert visit.column("Cell") == []
    assert visit.count() == "0 of 14 cells"


def test_a_filter_survives_sorting(visit: Visit) -> None:
    visit.choice("Data").select_option("brain")
    visit.heading("Reconstructed").click()
    assert visit.column("Data") == ["brain"] * 7


def test_more_columns_on_demand(visit: Visit) -> None:
    assert not visit.heading("Legacy SSIM").is_visible()
    visit.choice("Columns").select_option("all")
    assert visit.heading("Legacy SSIM").is_visible()
    assert visit.overflow() == 0


def test_a_cells_number_opens_its_pictures(visit: Visit) -> None:
    assert not visit.page.locator("#cell-3").get_by_text("Median victim").is_visible()
    visit.page.locator("#cells-table").get_by_role("link", name="Pictures of cell 3", exact=True).click()
    assert visit.page.locator("#cell-3").get_by_text("Median victim").is_visible()
    visit.page.get_by_role("button", name="Close all").click()
    assert visit.page.locator("#pictures details[open]").count() == 0
    visit.page.get_by_role("button", name="Open all").click()
    assert visit.page.locator("#pictures details:not([open])").count() == 0


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_sticks_out_of_a_small_screen(browser: Browser, report: Path, width: int) -> None:
    visit = Visit(browser, report, width)
    visit.page.get_by_role("button", name="Open all").click()
    visit.choice("Columns").select_option("all")
    assert visit.overflow() == 0
    outside = """[...document.querySelectorAll("body *")].filter((element) =>
        element.getBoundingClientRect().right > innerWidth + 1 && !element.closest(".scroll")).length"""
    assert visit.page.evaluate(outside) == 0
    visit.close()


def test_print_leaves_out_what_cannot_be_used_on_paper(visit: Visit) -> None:
    visit.page.emulate_media(media="print")
    for selector in ("nav", "#cells-text", "#cells-count", '[data-open-all="pictures"]'):
        assert not visit.page.locator(selector).first.is_visible()
    for selector in (".overall", "#cells-table", ".chart svg", "#pictures details[open] img", "#reproduce pre"):
        assert visit.page.locator(selector).first.is_visible()
    assert visit.page.pdf(prefer_css_page_size=True).startswith(b"%PDF")


def test_without_scripts_everything_is_there(browser: Browser, report: Path) -> None:
    visit = Visit(browser, report, 1280, javascript=False)
    assert visit.page.locator("#cells-table tbody tr:visible").count() == 14
    assert visit.page.locator("#cells-table thead").get_by_text("Legacy SSIM").is_visible()
    assert not visit.page.locator("#cells-text").is_visible()
    visit.close()


def test_texts_stand_out_from_their_background(visit: Visit) -> None:
    script = """() => {
        const part = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
        const light = (rgb) =>
            [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => sum + weight * part(rgb[i] / 255), 0);
        const color = (text) => text.match(/[\\d.]+/g).map(Number);
        const back = (element) => {
            for (let at = element; at; at = at.parentElement) {
                const found = color(getComputedStyle(at).backgroundColor);
                if (found.length < 4 || found[3] > 0) return found;
            }
            return [255, 255, 255];
        };
        const weak = [];
        for (const element of document.querySelectorAll("body *:not(script)")) {
            const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
            if (!own || element.closest("svg") || !element.checkVisibility()) continue;
            const [a, b] = [light(color(getComputedStyle(element).color)), light(back(element))].sort((x, y) => y - x);
            if ((a + 0.05) / (b + 0.05) < 4.5) weak.push(element.outerHTML.slice(0, 80));
        }
        return weak;
    }"""
    assert visit.page.evaluate(script) == []

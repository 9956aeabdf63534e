"""The report's figures with what stands around them: success curves, and leakage over rounds."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from medpfl.report.curves import Panel, panels
from medpfl.report.figures import success_svg
from medpfl.report.round_figure import rounds_svg
from medpfl.report.rounds import RoundPanel, few_rounds, round_panels
from medpfl.report.views import Audit


@dataclass(frozen=True)
class Chart:
    """A panel with its drawing."""

    panel: Panel
    svg: Markup


@dataclass(frozen=True)
class ChartGroup:
    """The panels of one data set; `left_out` says whether rounds were left out."""

    dataset: str
    charts: tuple[Chart, ...]
    left_out: bool = False


@dataclass(frozen=True)
class RoundChart:
    """Leakage over the rounds of one recording."""

    panel: RoundPanel
    svg: Markup


def chart_groups(audit: Audit) -> tuple[ChartGroup, ...]:
    """Success curves by data set; of a recording with many rounds those of the first, the middle and the last."""
    groups = []
    for number, dataset in enumerate(audit.datasets, 1):
        cells = [cell for cell in audit.cells if cell.dataset == dataset]
        shown = few_rounds(cells)
        charts = tuple(
            Chart(panel, Markup(success_svg(panel, audit.threshold, f"d{number}p{index}", _alt(panel, dataset))))
            for index, panel in enumerate(panels(shown, audit.threshold), 1)
        )
        if charts:
            groups.append(ChartGroup(dataset, charts, len(shown) < len(cells)))
    return tuple(groups)


def round_charts(audit: Audit) -> tuple[RoundChart, ...]:
    """Leakage over rounds, a figure for each recording."""
    return tuple(
        RoundChart(panel, Markup(rounds_svg(panel, audit.threshold, f"r{index}", _round_alt(panel))))
        for index, panel in enumerate(round_panels(audit), 1)
    )


def _alt(panel: Panel, dataset: str) -> str:
    lines = ", ".join(line.label for line in panel.lines)
    return (
        f"Share of images at every SSIM threshold, {dataset}, {panel.title}: {lines}. The table below has the values."
    )


def _round_alt(panel: RoundPanel) -> str:
    lines = ", ".join(course.label for course in panel.courses)
    return f"Mean SSIM by round, {panel.title}: {lines}. The table below has the values."

"""Leakage over rounds as inline SVG."""

from __future__ import annotations

import io
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from medpfl.report.figures import NULL_STYLES, SETTINGS, embeddable, line_style
from medpfl.report.rounds import Course, RoundPanel

MOST_TICKS = 10
"""Rounds that are written below the figure."""

SPREAD = 0.5
"""Share of the distance between two rounds over which the attacks of one round are spread, so that intervals stand apart."""


def rounds_svg(panel: RoundPanel, threshold: float, prefix: str, description: str) -> str:
    """Mean SSIM by round, one curve for each attack with its intervals, beside the most similar other image.

    Rounds stand at equal distances, whatever lies between them. Ids start with `prefix`; `description` is the alt text.
    """
    drawing: Any = {**SETTINGS, "svg.hashsalt": prefix}
    with rc_context(drawing):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        null = NULL_STYLES["nearest"]
        known = [(place, value) for place, value in enumerate(panel.nulls) if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=null.color, linewidth=1.8, dashes=null.dashes)
        for index, course in enumerate(panel.courses):
            _draw(axes, course, index, len(panel.courses))
        axes.axhline(threshold, color="#555555", linewidth=0.8)
        axes.set(xlim=(-0.5, len(panel.rounds) - 0.5), ylim=(0, 1.02), xlabel="Round", ylabel="Mean SSIM")
        step = -(-(len(panel.rounds) - 1) // (MOST_TICKS - 1)) or 1
        places = list(range(0, len(panel.rounds), step))
        axes.set_xticks(places, [str(panel.rounds[place]) for place in places])
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return embeddable(stream.getvalue(), prefix, description)


def _draw(axes: Any, course: Course, index: int, courses: int) -> None:
    style = line_style(index)
    shift = SPREAD * ((index + 0.5) / courses - 0.5)
    points = [(place + shift, cell.ssim) for place, cell in enumerate(course.cells) if cell is not None]
    dashes = (0, style.dashes) if style.dashes else "-"
    axes.plot(
        [place for place, _ in points],
        [measured.value for _, measured in points],
        color=style.color, linewidth=1.5, linestyle=dashes, marker=style.marker, markersize=5, clip_on=False,
    )  # fmt: skip
    for place, measured in points:
        if measured.low is not None and measured.high is not None:
            axes.plot([place, place], [measured.low, measured.high], color=style.color, linewidth=1.1, alpha=0.75)

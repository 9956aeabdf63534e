"""Success curves as inline SVG: no script, no outside reference, ids that are unique in the page."""

from __future__ import annotations

import html
import io
import re
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from medpfl.report.curves import THRESHOLDS, Panel

Dash = tuple[float, tuple[float, ...]] | str


@dataclass(frozen=True)
class Style:
    """How a line looks, in the figure and in its legend."""

    color: str
    dashes: tuple[float, ...] = ()
    marker: str = ""


LINE_STYLES = (
    Style("#0b3c8c", (), "o"),
    Style("#b3420b", (), "s"),
    Style("#00695c", (), "^"),
    Style("#8e1560", (), "D"),
    Style("#6b4e00", (), "v"),
    Style("#3d3d9e", (6, 2), "o"),
    Style("#a3151c", (6, 2), "s"),
    Style("#1f6f1f", (6, 2), "^"),
)
"""Dark colors on white, told apart by marker and dash as well."""

NULL_STYLES = {
    "nearest": Style("#333333", (5, 3)),
    "class_mean": Style("#666666", (2, 2)),
    "noise": Style("#767676", (1, 3)),
}

SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "path.simplify": True,
}
"""How figures are drawn, whatever the machine's own settings."""


def success_svg(panel: Panel, threshold: float, prefix: str, description: str) -> str:
    """The curves of one panel as an SVG element whose ids start with `prefix`; `description` is its alt text."""
    settings: Any = {**SETTINGS, "svg.hashsalt": prefix}
    with rc_context(settings):
        figure = Figure(figsize=(5.2, 3.3), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for mark in panel.nulls:
            style = NULL_STYLES[mark.name]
            if mark.values is not None:
                axes.plot(THRESHOLDS, mark.values, color=style.color, linewidth=1.8, dashes=style.dashes)
            elif mark.rate is not None:
                axes.plot(
                    [threshold],
                    [mark.rate],
                    color=style.color,
                    marker="x",
                    markersize=8,
                    markeredgewidth=2,
                    clip_on=False,
                )
        every = max(1, len(THRESHOLDS) // 8)
        for index, line in enumerate(panel.lines):
            style = line_style(index)
            axes.plot(
                THRESHOLDS,
                line.values,
                color=style.color,
                linewidth=1.8,
                linestyle=(0, style.dashes) if style.dashes else "-",
                marker=style.marker,
                markersize=5,
                markevery=(index * every // 8, every),
                clip_on=False,
            )
        axes.axvline(threshold, color="#555555", linewidth=0.8)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="SSIM threshold", ylabel="Share of images")
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0%", "25%", "50%", "75%", "100%"])
        axes.grid(color="#dddddd", linewidth=0.6)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return embeddable(stream.getvalue(), prefix, description)


def line_style(index: int) -> Style:
    """The style of a panel's line."""
    return LINE_STYLES[index % len(LINE_STYLES)]


def embeddable(svg: str, prefix: str, description: str) -> str:
    """Drops what only a file of its own needs, and makes ids unique in the page."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    view = re.search(r'viewBox="([^"]*)"', opening)
    box = view.group(1) if view else "0 0 374.4 237.6"
    rest = re.sub(r'\bid="', f'id="{prefix}-', rest)
    rest = re.sub(r"url\(#", f"url(#{prefix}-", rest)
    rest = re.sub(r'xlink:href="#', f'href="#{prefix}-', rest)
    return f'<svg viewBox="{box}" role="img" aria-label="{html.escape(description)}">{rest}'

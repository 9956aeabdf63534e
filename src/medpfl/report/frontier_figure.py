"""Leakage against utility as inline SVG: a curve per kind of defense over its strength."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from medpfl.audit.prices import Frontier, Priced
from medpfl.report.figures import SETTINGS, Style, embeddable

NONE = Style("#000000", (), "P")
"""How no defense looks."""


def frontier_svg(found: Frontier, styles: Mapping[str, Style], leakage: str, prefix: str, description: str) -> str:
    """The figure as an SVG element whose ids start with `prefix`."""
    settings: Any = {**SETTINGS, "svg.hashsalt": prefix}
    with rc_context(settings):
        figure = frontier_figure(found, styles, leakage)
        FigureCanvasSVG(figure)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return embeddable(stream.getvalue(), prefix, description)


def frontier_figure(found: Frontier, styles: Mapping[str, Style], leakage: str) -> Figure:
    """The figure itself; points bear the numbers of the table's rows. styles: by family. leakage: what the axis says.

    Thin lines are the 95% intervals. A hollow point is dominated by another one, a ring marks the recommended one. The
    shaded part is what lies beyond the limit.
    """
    figure = Figure(figsize=(5.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    _references(axes, found)
    for family in dict.fromkeys(setting.family for setting in found.settings):
        members = [one for one in found.settings if one.family == family and _drawn(one)]
        style = styles.get(family, NONE)
        if len(members) > 1:
            axes.plot(
                [one.leakage.value or 0.0 for one in members],
                [one.auc.value or 0.0 for one in members],
                color=style.color,
                linewidth=1.4,
                linestyle=(0, style.dashes) if style.dashes else "-",
                alpha=0.7,
            )
        for one in members:
            _point(axes, one, style, found)
    axes.set(xlabel=leakage[:1].upper() + leakage[1:], ylabel="AUC on held-out images")
    axes.grid(color="#e3e3e3", linewidth=0.6)
    axes.margins(0.08)
    _limit(axes, found)
    return figure


def _drawn(setting: Priced) -> bool:
    return setting.leakage.value is not None and setting.auc.value is not None


def _point(axes: Axes, setting: Priced, style: Style, found: Frontier) -> None:
    x, y = setting.leakage.value or 0.0, setting.auc.value or 0.0
    for span, horizontal in ((setting.leakage, True), (setting.auc, False)):
        if span.low is not None and span.high is not None:
            ends = ([span.low, span.high], [y, y]) if horizontal else ([x, x], [span.low, span.high])
            axes.plot(*ends, color=style.color, linewidth=0.8, alpha=0.45)
    hollow = setting.dominated_by is not None
    axes.plot(
        [x],
        [y],
        marker=style.marker,
        color=style.color,
        markerfacecolor="white" if hollow else style.color,
        markersize=8,
        markeredgewidth=1.5,
        zorder=4,
    )
    if setting.defense == found.recommended:
        axes.plot([x], [y], marker="o", markersize=17, markerfacecolor="none", markeredgecolor="#000000", zorder=5)
    number = found.settings.index(setting) + 1
    axes.annotate(
        str(number), (x, y), textcoords="offset points", xytext=(7, 6), fontsize=9, color=style.color, zorder=6
    )


def _references(axes: Axes, found: Frontier) -> None:
    if found.alone.value is not None:
        axes.axhline(found.alone.value, color="#555555", linewidth=1.0, dashes=(6, 3))
        _named(axes, found.alone.value, "clients alone")
    if found.guessing is not None:
        axes.axhline(found.guessing, color="#777777", linewidth=1.0, dashes=(1, 3))
        _named(axes, found.guessing, "guessing")


def _named(axes: Axes, height: float, text: str) -> None:
    axes.annotate(
        text,
        (0.55, height),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        xytext=(0, 2),
        ha="center",
        fontsize=9,
        color="#444444",
    )


def _limit(axes: Axes, found: Frontier) -> None:
    """Shades what lies beyond the limit."""
    if found.limit is None:
        return
    comparison, value = found.limit.split()[1:]
    low, high = axes.get_xlim()
    bound = float(value)
    low, high = min(low, bound), max(high, bound)
    axes.set_xlim(low, high)
    beyond = (bound, high) if comparison.startswith("<") else (low, bound)
    axes.axvspan(*beyond, color="#f0e4d7", alpha=0.5, zorder=0)
    axes.axvline(bound, color="#7a4a00", linewidth=1.0, zorder=1)

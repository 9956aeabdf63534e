"""The page and the figure of `known_noise.py`."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from pathlib import Path

import numpy as np

from medpfl.metrics.statistics import bootstrap_mean, paired_difference, success_curve

Row = dict[str, str]

NULLS = ("class_mean", "nearest")

NAMES = {
    "class_mean": "null: mean of the auxiliary images of the label",
    "nearest": "null: nearest auxiliary image",
    "published": "published: squared differences, no prior",
    "likelihood": "likelihood of the noise, no prior",
    "total_variation": "likelihood + total variation",
    "principal_components": "likelihood + principal components",
    "covariance": "likelihood + whole covariance",
    "denoiser": "likelihood + covariance, then denoiser",
}

THRESHOLDS = (0.5, 0.7, 0.9)
"""SSIM from which a reconstruction counts as a success."""


def chosen(rows: Sequence[Row], part: str = "test") -> list[Row]:
    """Rows of the victims that are reported, with the attacks' own settings."""
    return [row for row in rows if row["part"] == part and not row["settings"]]


def table(rows: Sequence[Row]) -> str:
    """Markdown: one table per data set, then what knowing the noise and the images is worth."""
    rows = chosen(rows)
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        scales = sorted({float(row["scale"]) for row in rows if row["data"] == data})
        victims = max(int(row["victim"]) for row in rows if row["data"] == data) + 1
        lines += [f"### {data} ({victims} victims)", ""]
        lines += [
            "| attacker | " + " | ".join(f"b = {scale:g}" for scale in scales) + " |",
            "|---" * (1 + len(scales)) + "|",
        ]
        for side, name in NAMES.items():
            cells = [_cell(rows, data, scale, side) for scale in scales]
            if any(cells):
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += ["", *_gains(rows, data, scales), ""]
    return "\n".join(lines)


def _values(rows: Sequence[Row], data: str, scale: float, side: str, column: str) -> np.ndarray:
    found = [row for row in rows if (row["data"], float(row["scale"]), row["side"]) == (data, scale, side)]
    return np.array([float(row[column]) for row in sorted(found, key=lambda row: int(row["victim"]))])


def _cell(rows: Sequence[Row], data: str, scale: float, side: str) -> str:
    """Median PSNR, mean SSIM and success rates."""
    quality, likeness = (_values(rows, data, scale, side, column) for column in ("psnr", "ssim"))
    if not len(quality):
        return ""
    rates = " / ".join(f"{rate:.2f}" for rate in success_curve(likeness, THRESHOLDS))
    return f"{np.median(quality):.1f} dB, {likeness.mean():.2f} ({rates})"


def _gains(rows: Sequence[Row], data: str, scales: Sequence[float]) -> list[str]:
    """Paired differences with intervals, and the noise at which the published attack sees as much."""
    lines = ["| mean gain in dB [95%] | " + " | ".join(f"b = {scale:g}" for scale in scales) + " |"]
    lines.append("|---" * (1 + len(scales)) + "|")
    pairs = [("likelihood", "published"), ("total_variation", "likelihood"), ("covariance", "likelihood")]
    pairs += [("denoiser", "covariance"), ("denoiser", "published"), ("denoiser", "best null")]
    for ours, theirs in pairs:
        cells = [_gain(rows, data, scale, ours, theirs) for scale in scales]
        lines.append(f"| {ours} over {theirs} | " + " | ".join(cells) + " |")
    equal = [_equal_noise(rows, data, scales, scale) for scale in scales]
    return [*lines, "| noise at which the published attack is as good (median) | " + " | ".join(equal) + " |"]


def _gain(rows: Sequence[Row], data: str, scale: float, ours: str, theirs: str) -> str:
    mine = _values(rows, data, scale, ours, "psnr")
    if theirs == "best null":
        nulls = [_values(rows, data, scale, null, "psnr") for null in NULLS]
        other = max(nulls, key=lambda values: float(values.mean()) if len(values) else -np.inf)
    else:
        other = _values(rows, data, scale, theirs, "psnr")
    if not len(mine) or len(mine) != len(other):
        return ""
    one = paired_difference(mine, other, np.arange(len(mine)), seed=0)
    return f"{one.mean:+.1f} [{one.low:+.1f}, {one.high:+.1f}]"


def _equal_noise(rows: Sequence[Row], data: str, scales: Sequence[float], scale: float) -> str:
    """By interpolation of the published attack's medians over the logarithm of the noise."""
    wanted = _values(rows, data, scale, "denoiser", "psnr")
    medians = [_values(rows, data, one, "published", "psnr") for one in scales]
    if not len(wanted) or not all(len(one) for one in medians):
        return ""
    level, curve = float(np.median(wanted)), [float(np.median(one)) for one in medians]
    for place in range(len(scales) - 1):
        above, below = curve[place], curve[place + 1]
        if above >= level >= below and above > below:
            share = (above - level) / (above - below)
            return f"{scales[place] * np.exp(share * log(scales[place + 1] / scales[place])):.2g}"
    return f"below {scales[0]:g}" if level > curve[0] else f"above {scales[-1]:g}"


def figure(rows: Sequence[Row], path: Path) -> None:
    """Median PSNR over the noise, one panel per data set, with intervals of the mean behind the best attack."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = chosen(rows)
    sets = list(dict.fromkeys(row["data"] for row in rows))
    fig, panels = plt.subplots(1, len(sets), figsize=(4.2 * len(sets), 4.2), sharey=True, squeeze=False)
    for panel, data in zip(panels[0], sets, strict=True):
        scales = sorted({float(row["scale"]) for row in rows if row["data"] == data})
        for side, name in NAMES.items():
            found = [(scale, _values(rows, data, scale, side, "psnr")) for scale in scales]
            found = [(scale, values) for scale, values in found if len(values)]
            if found:
                style = ":" if side in NULLS else "-"
                panel.plot(
                    [one for one, _ in found], [float(np.median(v)) for _, v in found], style, marker="o", label=name
                )
            if side == "denoiser" and found:
                bands = [bootstrap_mean(v, np.arange(len(v)), seed=0) for _, v in found]
                low, high = [one.low or 0.0 for one in bands], [one.high or 0.0 for one in bands]
                panel.fill_between([one for one, _ in found], low, high, alpha=0.15)
        panel.set_xscale("log")
        panel.set_title(data)
        panel.set_xlabel("Laplace noise b")
    panels[0][0].set_ylabel("median PSNR (dB)")
    panels[0][-1].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=110)

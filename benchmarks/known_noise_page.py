"""The page and the figure of `known_noise.py`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import log
from pathlib import Path

import numpy as np

from medpfl.metrics.statistics import paired_difference, success_curve

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

INTRO = """# What knowing the noise, and what images look like, is worth

`lenet_dlg` with uniform(-0.5, 0.5) weights, 32x32, one gradient of one image, Laplace noise of scale b on every entry, no
clipping. Every victim has a net of its own; about a quarter of such nets are sure of the victim's label, and those gradients
hide the image whoever attacks (which is why medians stand here). Labels are inferred. All sides see the same victims,
nets and noise and spend at most as many gradient evaluations as the rows say, rehearsals included. Priors are learnt from
the images of the same folder that are no victims (80, 56 and 32 of them), near duplicates of which the folders do not
hold. `photographs`: grey crops of three of scikit-image's photographs, auxiliary crops from three others.

    .venv/bin/python benchmarks/known_noise.py --csv docs/benchmarks/known_noise.csv \\
        --table docs/benchmarks/known_noise.md --figure docs/benchmarks/known_noise.png

![median PSNR over the noise](known_noise.png)

Cells: median PSNR, mean SSIM (share of victims with SSIM of at least 0.5 / 0.7 / 0.9).

"""

TUNED = """## How settings were chosen

On brain images only, at b = 0.01, on at most 12 victims of the development part (`--development`): the learning rate of the
published side (0.02 and 0.05, medians 14.4 and 14.3 dB), the strength of total variation (0.3, 1 and 3: 20.7, 23.8 and 23.0
dB), weak variations of auxiliary images for the covariance (27.2 dB without, 27.7 dB with), and on 8 victims with other nets and noise
the stages of the denoiser (six schedules, two forms) and the shares of the covariance (eleven values by the likelihood of
auxiliary images alone, of which the attack chooses among five itself). Two of those 8 images are among the 16 brain
victims reported here; the medians without them stand below the brain table. Chest, skin and photographs were not tuned on.

With so few auxiliary images the covariance is the better half of what can be learnt: what the denoiser adds to it stands in
the rows `denoiser over covariance`. Priors that were learnt from other hospitals, other modalities, phantoms and wrong
organs: [other_priors.md](other_priors.md).

The published side is searched with Adam, and from b = 0.01 to 0.003 its median rises by little more than 1 dB on brain MRI:
with 300 evaluations and without a prior the search, not the noise, holds it back on many nets. Part of what the covariance
gains is that its search is preconditioned by it. What an L-BFGS search of the published distance finds, and the noise at which it sees as much as who knows: [noise_bought.md](noise_bought.md).

Tried and left out: mixtures of normal distributions on 6x6 patches (expected patch log likelihood) beside the covariance:
up to 1.3 dB better where the covariance is good already, up to 5 dB worse on nets that show little, +0.1 dB on average. A
network that gets the covariance's own estimate beside the noisy image: no better after as many steps, and slower. Taking
the denoiser's last output for the image: 0.2 dB worse.
"""

CONTROLLED = (
    ("likelihood", "published"),
    ("total_variation", "likelihood"),
    ("covariance", "total_variation"),
    ("denoiser", "published"),
    ("denoiser", "nearest"),
)
"""Gains that are compared between medical images and photographs."""

SEEN = {"brain_mri": (6, 9)}
"""Victims whose images were used, with other nets and noise, when settings were chosen."""

THRESHOLDS = (0.5, 0.7, 0.9)
"""SSIM from which a reconstruction counts as a success."""


def chosen(rows: Sequence[Row], part: str = "test") -> list[Row]:
    """Rows of the victims that are reported, with the attacks' own settings."""
    return [row for row in rows if row["part"] == part and not row["settings"]]


def table(rows: Sequence[Row]) -> str:
    """Markdown: one table per data set, then what knowing the noise and the images is worth."""
    rows = chosen(rows)
    lines = [INTRO.rstrip(), ""]
    for data in dict.fromkeys(row["data"] for row in rows):
        scales = sorted({float(row["scale"]) for row in rows if row["data"] == data})
        victims = max(int(row["victim"]) for row in rows if row["data"] == data) + 1
        spent = max(int(row["budget"]) for row in rows if row["data"] == data)
        lines += [f"## {data} ({victims} victims, {spent} evaluations)", ""]
        lines += [
            "| attacker | " + " | ".join(f"b = {scale:g}" for scale in scales) + " |",
            "|---" * (1 + len(scales)) + "|",
        ]
        for side, name in NAMES.items():
            cells = [_cell(rows, data, scale, side) for scale in scales]
            if any(cells):
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += ["", *_gains(rows, data, scales), "", *_without(rows, data, scales), ""]
    return "\n".join([*lines, *_control(rows), TUNED])


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
    return [
        *lines,
        "| noise at which the published attack is as good as the covariance (medians) | " + " | ".join(equal) + " |",
    ]


def _without(rows: Sequence[Row], data: str, scales: Sequence[float]) -> list[str]:
    """Medians without the victims whose images were used to choose settings."""
    if data not in SEEN:
        return []
    found = []
    for side in ("published", "covariance", "denoiser"):
        for scale in scales:
            values = _values(rows, data, scale, side, "psnr")
            kept = [value for place, value in enumerate(values) if place not in SEEN[data]]
            found += [f"{side} at b = {scale:g}: {np.median(kept):.1f} dB"] if kept else []
    return [f"Without victims {', '.join(map(str, SEEN[data]))}: {'; '.join(found)}."]


def _control(rows: Sequence[Row]) -> list[str]:
    """How much more knowing helps against medical images than against photographs, unpaired."""
    lines = [
        "## Is it the medical images?",
        "",
        "Mean gain on a medical data set minus that on photographs, in dB [95%]:",
        "",
    ]
    lines += ["| | " + " | ".join(f"{ours} over {theirs}" for ours, theirs in CONTROLLED) + " |"]
    lines += ["|---" * (1 + len(CONTROLLED)) + "|"]
    scales = sorted({float(row["scale"]) for row in rows if row["data"] == "photographs"})
    for data in dict.fromkeys(row["data"] for row in rows if row["data"] != "photographs"):
        for scale in scales:
            cells = [_apart(rows, data, scale, ours, theirs) for ours, theirs in CONTROLLED]
            if any(cells):
                lines.append(f"| {data}, b = {scale:g} | " + " | ".join(cells) + " |")
    return [*lines, ""] if scales else []


def _apart(rows: Sequence[Row], data: str, scale: float, ours: str, theirs: str) -> str:
    gains = []
    for one in (data, "photographs"):
        mine, other = (_values(rows, one, scale, side, "psnr") for side in (ours, theirs))
        if not len(mine) or len(mine) != len(other):
            return ""
        gains.append(mine - other)
    draw = np.random.default_rng(0)
    resampled = [draw.choice(gain, (2000, len(gain))).mean(axis=1) for gain in gains]
    low, high = np.percentile(resampled[0] - resampled[1], [2.5, 97.5])
    return f"{gains[0].mean() - gains[1].mean():+.1f} [{low:+.1f}, {high:+.1f}]"


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
    wanted = _values(rows, data, scale, "covariance", "psnr")
    curve = [(one, _values(rows, data, one, "published", "psnr")) for one in scales]
    medians = [(one, float(np.median(values))) for one, values in curve if len(values)]
    if not len(wanted) or not medians:
        return ""
    level = float(np.median(wanted))
    for (weak, above), (strong, below) in pairwise(medians):
        if above >= level >= below and above > below:
            return f"{weak * np.exp((above - level) / (above - below) * log(strong / weak)):.2g}"
    return f"below {medians[0][0]:g}" if level > medians[0][1] else f"above {medians[-1][0]:g}"


COLORS = {
    "published": "tab:red",
    "likelihood": "tab:orange",
    "total_variation": "tab:olive",
    "principal_components": "tab:cyan",
    "covariance": "tab:blue",
    "denoiser": "tab:purple",
}

SEARCHED = "published, searched by L-BFGS"

TITLES = {
    "brain_mri": "Brain MRI",
    "covid_cxr": "Chest X-ray",
    "melanoma": "Skin",
    "photographs": "Photographs (control)",
}


def figure(rows: Sequence[Row], path: Path, searched: Sequence[Row] = ()) -> None:
    """Median PSNR over the noise, one panel per data set, with intervals of the median; grey where no null is beaten.

    searched: rows of `noise_bought.py`, the published distance searched by L-BFGS.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = chosen(rows)
    sets = list(dict.fromkeys(row["data"] for row in rows))
    fig, panels = plt.subplots(1, len(sets), figsize=(3.6 * len(sets), 4.4), sharey=True, squeeze=False)
    for panel, data in zip(panels[0], sets, strict=True):
        scales = sorted({float(row["scale"]) for row in rows if row["data"] == data})
        best = max(float(np.median(_values(rows, data, scales[0], null, "psnr"))) for null in NULLS)
        panel.axhspan(0, best, color="0.9", label="no better than a picture that owes nothing to the update")
        for side, color in COLORS.items():
            values = {scale: _values(rows, data, scale, side, "psnr") for scale in scales}
            values = {scale: found for scale, found in values.items() if len(found)}
            if not values:
                continue
            middle = [float(np.median(found)) for found in values.values()]
            panel.plot(list(values), middle, color=color, marker="o", label=NAMES[side])
            if side not in ("published", "covariance"):
                continue
            ends = np.array([_median_interval(found) for found in values.values()])
            panel.fill_between(list(values), ends[:, 0], ends[:, 1], color=color, alpha=0.12, linewidth=0)
        again = {scale: _values(searched, data, scale, "lbfgs tiled", "psnr") for scale in scales}
        again = {scale: found for scale, found in again.items() if len(found)}
        middle = [float(np.median(found)) for found in again.values()]
        if again:
            panel.plot(list(again), middle, color=COLORS["published"], marker="s", linestyle="--", label=SEARCHED)
        panel.set_xscale("log")
        panel.set_xticks(scales, [f"{scale:g}" for scale in scales])
        panel.minorticks_off()
        panel.set_title(TITLES.get(data, data))
        panel.set_xlabel("Laplace noise b on every entry")
    panels[0][0].set_ylim(8, 38)
    panels[0][0].set_ylabel("median PSNR (dB)")
    shown = {name: line for panel in panels[0] for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    fig.legend(shown.values(), shown.keys(), loc="lower center", ncols=3, fontsize=9, frameon=False)
    fig.tight_layout(rect=(0, 0.16, 1, 1))
    fig.savefig(path, dpi=110)


def _median_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap of the median over victims."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return float(low), float(high)

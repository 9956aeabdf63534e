"""The page of `noise_bought.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import exp, inf, log

import numpy as np
from known_noise_page import Row
from tables import markdown

KNOWING = {"total_variation": "likelihood + total variation", "covariance": "likelihood + whole covariance"}
"""Who knows the noise, in known_noise.csv; the second has a learnt prior too."""

LEVELS = (0.01, 0.03)
"""Noise under which who knows is compared."""

DRAWS = 2000

INTRODUCTION = """# Which noise does knowing it buy?

The same victims and nets as in [known_noise](known_noise.md) (`lenet_dlg`, 32x32, one gradient of one image, Laplace noise of
scale b on every entry). There the published distance (squared differences, no prior, noise unknown) was searched with Adam
in 300 gradient evaluations, which left open whether the noise or the search held it back. Here it is searched at its best: by
L-BFGS in float64 too (from a tiled patch, as CPL starts), and at less and less noise. `--evaluations 3000` adds ten times the
evaluations, which take an hour and are not measured yet.

    python benchmarks/noise_bought.py --csv docs/benchmarks/noise_bought.csv --table docs/benchmarks/noise_bought.md

Median PSNR over 16 victims, labels inferred by everybody. Equal noise: the scale at which the published search has the median
of who knows at the scale named, interpolated between measured scales on a logarithmic axis, with a 95 % interval (2,000
resamples of the victims, the same for both sides). Read it as: who does not know sees as much only at so much less noise. The
victims' own null baselines stand in known_noise.

What it shows: at b = 0.01 it is the noise that stops the published search on brain MRI and chest X-rays: L-BFGS finds no more than
Adam. Below, Adam's own weakness stopped it, and the rows of known_noise that put the equal noise below 0.001 are about Adam.
Against the best of both, knowing mechanism and prior buys a factor of about four in noise on brain MRI and five on chest
X-rays at b = 0.01 (the intervals of the equal noise say how sure that is), and eight and eleven at b = 0.03. On skin, with three
times the pixels, 300 evaluations are too few for L-BFGS under any noise, so what stands there is about the search, not
about the noise.
"""

TUNED = """## What was tuned

Published side, on the {victims} brain victims of the development part, 300 evaluations, medians at b = 0.01 and b = 0.0001:
{tuning}. Reported above: `adam 0.05`, and the best of the L-BFGS searches by these medians. That is {settings} settings at two
levels. The knowing side's settings were chosen on the same victims at b = 0.01 alone: strength of total variation (3 values),
weak variations (2), shares of the covariance (11), and for the denoiser, which is not used here, its stages (12). Chest and
skin were not tuned on by either side.
"""


def table(rows: Sequence[Row], known: Sequence[Row]) -> str:
    """Markdown. known: rows of known_noise."""
    lines = [INTRODUCTION]
    test = [row for row in rows if row["part"] == "test"]
    for data in dict.fromkeys(row["data"] for row in test):
        lines += _part([row for row in test if row["data"] == data], known, data)
    development = [row for row in rows if row["part"] == "development"]
    if development:
        lines.append(_tuning(development))
    return "\n".join(lines)


def _part(rows: Sequence[Row], known: Sequence[Row], data: str) -> list[str]:
    scales = sorted({float(row["scale"]) for row in rows}, reverse=True)
    curves = {
        f"{side}, {budget} evaluations": {scale: _values(rows, side, scale, budget) for scale in scales}
        for side, budget in dict.fromkeys((row["side"], row["budget"]) for row in rows)
    }
    curves = {name: {scale: found for scale, found in one.items() if len(found)} for name, one in curves.items()}
    best = {scale: max((one[scale] for one in curves.values() if scale in one), key=np.median) for scale in scales}
    curves["the best of these at each scale"] = best
    medians, equal = [], []
    for name, curve in curves.items():
        medians.append([name, *(f"{np.median(curve[scale]):.1f}" if scale in curve else "" for scale in scales)])
        informed = [_informed(known, data, who, level) for who in KNOWING for level in LEVELS]
        equal.append([name, *(equal_noise(one, curve) if len(one) else "" for one in informed)])
    lines = [f"## {data}", "", *markdown(["published search", *(f"b = {scale:g}" for scale in scales)], medians), ""]
    heads = []
    for who, words in KNOWING.items():
        for level in LEVELS:
            values = _informed(known, data, who, level)
            heads.append(f"{words} at b = {level:g} ({np.median(values):.1f} dB)" if len(values) else words)
    return [*lines, "Equal noise:", "", *markdown(["published search", *heads], equal), ""]


def equal_noise(informed: np.ndarray, curve: Mapping[float, np.ndarray]) -> str:
    """The scale at which the curve's median is that of `informed`, with an interval over resampled victims."""
    found = _crossing(informed, curve)
    draws = np.random.default_rng(0).integers(len(informed), size=(DRAWS, len(informed)))
    drawn = [_crossing(informed[one], {scale: values[one] for scale, values in curve.items()}) for one in draws]
    low, high = np.quantile(np.array(drawn), [0.025, 0.975], method="nearest")
    least, most = min(curve), max(curve)
    return f"{_shown(found, least, most)} [{_shown(low, least, most)}, {_shown(high, least, most)}]"


def _crossing(informed: np.ndarray, curve: Mapping[float, np.ndarray]) -> float:
    """The largest scale at which the curve still is above; 0 or infinity where it never or always is."""
    level = float(np.median(informed))
    medians = sorted((scale, float(np.median(values))) for scale, values in curve.items())
    if medians[-1][1] >= level:
        return inf
    for (weak, above), (strong, below) in reversed(list(pairwise(medians))):
        if above >= level > below:
            return weak * exp((above - level) / (above - below) * log(strong / weak))
    return 0.0


def _shown(scale: float, least: float, most: float) -> str:
    if scale == 0.0:
        return f"below {least:g}"
    return f"above {most:g}" if scale == inf else f"{scale:.2g}"


def _tuning(rows: Sequence[Row]) -> str:
    scales = sorted({float(row["scale"]) for row in rows}, reverse=True)
    sides = dict.fromkeys(row["side"] for row in rows)
    found = [
        f"{side} {' and '.join(f'{np.median(_values(rows, side, scale, None)):.1f}' for scale in scales)} dB"
        for side in sides
    ]
    victims = 1 + max(int(row["victim"]) for row in rows)
    return TUNED.format(victims=victims, tuning=", ".join(found), settings=len(sides))


def _informed(known: Sequence[Row], data: str, side: str, scale: float) -> np.ndarray:
    own = [row for row in known if row["data"] == data and row["part"] == "test" and not row["settings"]]
    return _values(own, side, scale, None)


def _values(rows: Sequence[Row], side: str, scale: float, budget: str | None) -> np.ndarray:
    found = [row for row in rows if row["side"] == side and float(row["scale"]) == scale]
    found = [row for row in found if budget is None or row["budget"] == budget]
    return np.array([float(row["psnr"]) for row in sorted(found, key=lambda row: int(row["victim"]))])

"""The table and the figure of `gradinv_quality.py`: quality against time, beside breaching and the null baselines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medpfl.metrics.statistics import bootstrap_mean, paired_difference

NULLS = ("class_mean", "nearest")
"""Sides that owe nothing to the update: one row per victim, of no iterations."""

Row = dict[str, str]


def table(rows: Sequence[Row], title: str, victims: int) -> str:
    """Markdown: one line per size, state and budget, the sides beside each other, with the paired difference."""
    lines = [
        f"# GradInv on ResNet18, beside breaching\n\n{title}, {victims} victims, one image each, color, "
        "plain gradient, batch norm in eval mode, no defense. `trained`: 5 epochs of Adam on the other images. Intervals "
        "resample victims (95 %). s: process time of one thread per victim.\n",
        "| size | state | evaluations | best null PSNR, SSIM | breaching PSNR | MedPFL PSNR | difference, dB |"
        " breaching SSIM | MedPFL SSIM | breaching s | MedPFL s |",
        "|" + " --- |" * 11,
    ]
    for size in sorted({int(row["size"]) for row in rows}):
        for state in ("untrained", "trained"):
            of_state = [row for row in rows if (row["size"], row["state"]) == (str(size), state)]
            null = _best_null(of_state)
            for budget in sorted({int(row["iterations"]) for row in rows}):
                line = _line([row for row in of_state if row["iterations"] == str(budget)])
                lines += [f"| {size} | {state} | {budget} | {null} | {line} |"] if line else []
    used = sorted({(row["side"], row["settings"]) for row in rows if row["side"] not in NULLS})
    lines += ["", *(f"Settings of {side}: {settings or 'its defaults'}." for side, settings in used), ""]
    lines += [
        "The best null is the better of two images that owe nothing to the update: the nearest other image of the data "
        "set (chosen with the truth in hand) and the class mean. An image below it shows no leak.",
        "",
    ]
    return "\n".join(lines)


def _best_null(rows: Sequence[Row]) -> str:
    """Means over victims of PSNR and SSIM, each of the null that is best in it."""
    means = []
    for name in ("psnr", "ssim"):
        values = [[float(row[name]) for row in rows if row["side"] == null] for null in NULLS]
        means.append(max((sum(one) / len(one) for one in values if one), default=float("nan")))
    return f"{means[0]:.1f}, {means[1]:.2f}"


def _line(rows: Sequence[Row]) -> str | None:
    sides = {side: [row for row in rows if row["side"] == side] for side in ("breaching", "medpfl")}
    if not all(sides.values()):
        return None

    def values(side: str, name: str) -> list[float]:
        return [float(row[name]) for row in sorted(sides[side], key=lambda row: int(row["victim"]))]

    def interval(side: str, name: str, digits: int) -> str:
        found = bootstrap_mean(values(side, name), range(len(sides[side])), seed=0)
        return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"

    gain = paired_difference(values("medpfl", "psnr"), values("breaching", "psnr"), range(len(sides["medpfl"])), seed=0)
    cells = [interval(side, name, digits) for name, digits in (("psnr", 1), ("ssim", 2)) for side in sides]
    cells.insert(2, f"{gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]")
    return " | ".join([*cells, *(f"{values(side, 'seconds')[0]:.0f}" for side in sides)])


def figure(rows: Sequence[Row], path: Path) -> None:
    """Mean PSNR against seconds per victim, one panel per size and state, one line per side."""
    from matplotlib.figure import Figure

    panels = sorted(
        {(int(row["size"]), row["state"]) for row in rows}, key=lambda panel: (panel[0], panel[1][0] == "t")
    )
    drawing = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for axes, (size, state) in zip(drawing.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for side, color, marker in (("breaching", "#b3541e", "s"), ("medpfl", "#1f5fa8", "o")):
            chosen = [r for r in rows if (r["size"], r["state"], r["side"]) == (str(size), state, side)]
            points = []
            for budget in sorted({int(row["iterations"]) for row in chosen}):
                of_budget = [row for row in chosen if row["iterations"] == str(budget)]
                psnrs = [float(row["psnr"]) for row in of_budget]
                points.append((float(of_budget[0]["seconds"]), sum(psnrs) / len(psnrs), budget))
            if points:
                axes.plot([p[0] for p in points], [p[1] for p in points], marker=marker, color=color, label=side)
            for seconds, value, budget in points:
                axes.annotate(str(budget), (seconds, value), textcoords="offset points", xytext=(0, 6), fontsize=7)
        null = [float(r["psnr"]) for r in rows if (r["size"], r["state"], r["side"]) == (str(size), state, "nearest")]
        if null:
            axes.axhline(sum(null) / len(null), color="#777777", linestyle=":", label="nearest other image (null)")
        axes.set(title=f"{size}x{size}, {state}", xlabel="seconds per victim (one thread)", ylabel="mean PSNR, dB")
        axes.set_xlim(left=0.0)
        axes.margins(y=0.15)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    drawing.savefig(path, dpi=110)

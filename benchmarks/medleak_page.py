"""The table of `medleak.py` as CSV and as a page."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

Key = tuple[str, str, str, str, int, int, str, str]


PLACED = ("empirical", "gaussian", "smoothed", "even, smoothed")
"""Ways to place bins, in the order of the table's columns."""

BINS_SAY = (
    "One division tells little: on ISIC gaps differ between divisions by 0.02 (standard deviation, N = 256, K = 512), so that a",
    "single one can show -0.05. Quantiles as they are lose most, where images are fewer than units; smoothing takes away four fifths",
    "of that. `python benchmarks/bin_widths.py` tries other smoothing on 60 divisions of ISIC (N = 256, K = 512): kernels of 0.3 to 2",
    "times Silverman's width lose 0.022 to 0.030, the width with the largest leave-one-out likelihood 0.022, mixtures with a",
    "normal distribution 0.023 to 0.025, Silverman's width 0.024. What is left is no matter of width: bins from the very images",
    "that are attacked still lose 0.017, because ISIC's mean values lie in clumps. Other measures of the same images do not.",
)


@dataclass(frozen=True)
class Row:
    """One setting over all its batches. Shares are of all private images, `of_alone` of those alone in their bin.

    came_back with low and high: above 30 dB, one candidate each, with a 95% interval over batches. least_psnr: 5%
    quantile of those that came back. null: share of private images that have one of the server's own above 30 dB.
    """

    part: str
    data: str
    images: int
    units: int
    setting: str
    batches: int
    closed_form: float
    alone: float
    came_back: float
    low: float
    high: float
    of_alone: float
    least_psnr: float
    null: float
    body: str = ""
    channel: str = ""
    grid: str = "8 bit"

    @property
    def key(self) -> Key:
        """What was measured."""
        return key(self.part, self.data, self.images, self.units, self.setting, self.channel, self.body, self.grid)


def key(
    part: str, data: str, images: int, units: int, setting: str, channel: str = "", body: str = "", grid: str = "8 bit"
) -> Key:
    """What a row measures."""
    return part, data, channel, body, images, units, setting, grid


def known(out: Path) -> list[Row]:
    """Rows of an earlier run."""
    path = out / "medleak.csv"
    if not path.exists():
        return []
    kinds = {"int": int, "float": float, "str": str}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(**{field.name: kinds[str(field.type)](row[field.name]) for field in fields(Row)})
            for row in csv.DictReader(file)
        ]


def write(rows: Sequence[Row], out: Path) -> None:
    """`medleak.csv` and `medleak.md` in that folder."""
    rows = sorted(rows, key=lambda row: (row.part, row.data != "PneumoniaMNIST", row.data, row.key[2:]))
    names = [field.name for field in fields(Row)]
    with (out / "medleak.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            values = [getattr(row, name) for name in names]
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])
    (out / "medleak.md").write_text(_page(rows), encoding="utf-8")


def _page(rows: Sequence[Row]) -> str:
    parts = {part: [row for row in rows if row.part == part] for part in ("bins", "closed", "peeling")}
    return "\n".join(
        [
            "# MedLeak: what comes back of one round",
            "",
            "Measured by `python benchmarks/medleak.py`, at 28x28. A client takes one float32 SGD step (learning rate 0.1)",
            "on N private images and sends weights; the module has K units. Recovered: above 30 dB, every candidate counted",
            "once, at most N candidates. The server's images and the clients' are disjoint halves of the data without",
            "duplicates, two divisions, each with its own net and module; secure channels have 8 clients.",
            "Rows that are not here were not measured yet; `--missing` measures them.",
            "",
            "## Several queries and peeling",
            "",
            "Share of all private images that come back, with a 95% interval over batches, beside the closed form of one",
            "query, (1 - 1/K)^(N - 1). `auto` chooses how many queries share the units. The body is drawn as PyTorch does.",
            "Null: share of private images that have one of the server's own images above 30 dB.",
            "",
            *_table(
                ["data", "pixels", "channel", "N", "K", "queries", "batches", "closed form", "came back", "5% PSNR", "null"],
                [
                    [
                        row.data, row.grid, row.channel, row.images, row.units, row.setting, row.batches,
                        f"{row.closed_form:.3f}", f"**{row.came_back:.3f}** [{row.low:.3f}, {row.high:.3f}]",
                        f"{row.least_psnr:.0f} dB", f"{row.null:.3f}",
                    ]
                    for row in parts["peeling"]
                ],
            ),
            "",
            "Color and N = 256 behind SecAgg+ lose rounds in one of the two divisions: two simulated rounds chose a scale of 1e-10,",
            "whose update is clipped in rounds with larger errors (0.57 to 1.00 came back of single rounds); with 3.2e-10, as clear in",
            "these two, all came back of all. To prefer the larger of equally clear scales was tried and dropped: it costs other attacks",
            "(Scale-MIA, trap weights) images that their update shows less clearly then.",
            "",
            "## One query against the images that are alone in their bin",
            "",
            "Alone: realized share of images that are the only ones in their bin, from the truth (for scoring only). Lost:",
            "share of these that did not come back, per channel.",
            "",
            *_table(
                ["data", "body", "N", "K", "batches", "alone", "lost, plain", "lost, secure_sum", "lost, secagg_plus", "null"],
                _lost(parts["closed"]),
            ),
            "",
            "## How many images are alone in their bin",
            "",
            "Realized share less (1 - 1/K)^(N - 1), with a 95% interval over 40 random divisions into the server's images and",
            "others, of ten batches each. Bins of the mean value from quantiles of the server's images as they are, from a",
            "normal distribution (the published recipe in our reading), from quantiles smoothed by normal kernels, and",
            "smoothed ones of the evenest query: of mean value, colors, patterns and cosines the one under which the server's",
            "own images share bins least (`patterns: even`).",
            "",
            *_table(["data", "N", "K", "closed form", "as they are", "normal", "smoothed", "smoothed, evenest query"], _gaps(parts["bins"])),
            "",
            *BINS_SAY,
        ]
    )  # fmt: skip


def _lost(rows: Sequence[Row]) -> list[list[object]]:
    together: dict[tuple[str, str, int, int], dict[str, Row]] = {}
    for row in rows:
        together.setdefault((row.data, row.body, row.images, row.units), {})[row.channel] = row
    lines = []
    for key, found in together.items():
        lost = [
            f"{1 - found[name].of_alone:.4f}" if name in found else ""
            for name in ("plain", "secure_sum", "secagg_plus")
        ]
        first = next(iter(found.values()))
        lines.append([*key, first.batches, f"{first.alone:.3f}", *lost, f"{first.null:.3f}"])
    return lines


def _gaps(rows: Sequence[Row]) -> list[list[object]]:
    together: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in rows:
        together.setdefault((row.data, row.images, row.units), {})[row.setting] = row
    return [
        [*key, f"{next(iter(found.values())).closed_form:.3f}", *(_gap(found.get(name)) for name in PLACED)]
        for key, found in together.items()
    ]


def _gap(row: Row | None) -> str:
    if row is None:
        return ""
    low, high = (value - row.closed_form for value in (row.low, row.high))
    return f"{row.alone - row.closed_form:+.3f} [{low:+.3f}, {high:+.3f}]"


def _table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> list[str]:
    return [f"| {' | '.join(str(value) for value in line)} |" for line in (head, ["---"] * len(head), *lines)]

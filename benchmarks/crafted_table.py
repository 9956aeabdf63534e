"""Rounds of `crafted_relatives.py` as rows of a CSV, and the table of all rounds of a setting."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from crafted_cases import CASES, Case, first_in_their_bin_expected
from tables import markdown

from medpfl.metrics.statistics import success_rate

HEAD = (
    "data", "client", "channel", "images", "attack", "rounds", "read [95%]", "at most", "closed form", "attributed", "PSNR",
    "candidates", "nearest auxiliary", "CPU s",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One round. Of the `sought` images that the attack is after: how many were read, can be at most, have an auxiliary
    image above 30 dB (`near`), and how many of those that were read are attributed to the client that holds them.

    psnr: median over the images that were read. seconds: of processor time.
    """

    data: str
    channel: str
    clients: int
    images: int
    steps: int
    update: str
    client: str
    units: int
    attack: str
    seed: int
    sought: int
    read: int
    at_most: int | None
    attributed: int | None
    psnr: float | None
    candidates: int
    near: int
    seconds: float

    @property
    def setting(self) -> tuple[object, ...]:
        """What rounds share that are of one line of the table."""
        return (
            self.data, self.channel, self.clients, self.images, self.steps, self.update, self.client, self.units, self.attack,
        )  # fmt: skip


def closed_form(case: Case, images: int, sought: int, units: int, steps: int) -> float | None:
    """The expected share that can be read, where there is a formula."""
    if steps > 1:
        return first_in_their_bin_expected(images, units, steps) if case.apart else None
    return None if case.closed_form is None else case.closed_form(images if case.apart else sought, units)


def table(rows: Sequence[Row], attacks: Sequence[str]) -> list[str]:
    """The lines of all settings in whose attack one of these patterns is found, all without any, in the order of the cases."""
    return markdown(HEAD, list(_lines(rows, attacks)))


def _lines(rows: Sequence[Row], attacks: Sequence[str]) -> Iterator[list[object]]:
    order = {case.label: place for place, case in enumerate(CASES)}
    wanted = [row for row in rows if row.attack in order and any(re.search(one, row.attack) for one in attacks or [""])]
    settings = {row.setting: row for row in wanted}
    ranked = sorted(
        settings.values(),
        key=lambda row: (
            row.data,
            row.client,
            row.clients,
            row.channel,
            row.images,
            order[row.attack],
            row.setting[5:],
        ),
    )
    for first in ranked:
        own = [row for row in wanted if row.setting == first.setting]
        yield _line(CASES[order[first.attack]], own)


def _line(case: Case, rows: Sequence[Row]) -> list[object]:
    first, sought = rows[0], sum(row.sought for row in rows)
    hits = [place < row.read for row in rows for place in range(row.sought)]
    found = success_rate(hits, [row.seed for row in rows for _ in range(row.sought)], seed=0)
    read, most = sum(row.read for row in rows), [row.at_most for row in rows if row.at_most is not None]
    told = [(row.attributed, row.read) for row in rows if row.attributed is not None]
    psnr = [row.psnr for row in rows if row.psnr is not None]
    expected = closed_form(case, first.images, first.sought, first.units, first.steps)
    spread = "" if found.low is None else f" [{found.low:.3f}, {found.high:.3f}]"
    several = f" in {first.steps} steps" if first.steps > 1 else ""
    units = "" if first.units == 512 else f", K = {first.units}"
    return [
        first.data,
        f"{first.client}{', gradients' if first.update == 'gradient' else ''}",
        f"{first.channel}, {first.clients} clients" if first.clients > 1 else first.channel,
        f"{first.images}{several}",
        f"{first.attack}{units}",
        len(rows),
        f"{read / sought:.3f}{spread}",
        f"{sum(most) / sought:.3f}" if most else None,
        None if expected is None else f"{expected:.3f}",
        f"{sum(one for one, _ in told) / max(1, sum(count for _, count in told)):.3f}" if told and read else None,
        f"{median(psnr):.1f}" if psnr else None,
        f"{sum(row.candidates for row in rows) / len(rows):.1f}",
        f"{sum(row.near for row in rows) / sought:.3f}",
        f"{sum(row.seconds for row in rows) / len(rows):.1f}",
    ]

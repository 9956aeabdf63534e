"""The guards measured as a detector: honest and crafted training runs, false alarms and detection.

    python benchmarks/guards_detector.py measure --data ../shared/data        # adds the rows that are missing
    python benchmarks/guards_detector.py table                                # docs/benchmarks/guards.md and .png

The unit is one training run with a net, images and recipe of its own. A run whose row is in the CSV is not measured
again; `--only` takes a part of the plan and `--processes` several of its runs at once.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from detector.plan import Planned, measured, planned
from detector.rows import add_row, read_rows, sorted_file

DOCS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is missing, or writes page and figure from the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("measure", "table"), help="measure runs, or write the page from the rows")
    parser.add_argument("--rows", type=Path, default=DOCS / "guards.csv", help="the CSV of runs")
    parser.add_argument("--data", type=Path, default=None, help="folder with the real images; drawings only without")
    parser.add_argument("--repeats", type=int, default=1, help="how many times the plan is run, with fresh seeds each")
    parser.add_argument("--first", type=int, default=0, help="number of the first repeat")
    parser.add_argument("--only", default="", help="runs whose id begins with this, such as crafted-medleak")
    parser.add_argument("--every", type=int, default=1, help="every n-th run only, for a first look")
    parser.add_argument("--minutes", type=float, default=8.0, help="no new run is started after that")
    parser.add_argument("--processes", type=int, default=1, help="runs at once")
    options = parser.parse_args(arguments)
    if options.part == "table":
        from detector.page import write_page

        write_page(sorted_file(options.rows), DOCS)
        return
    there = {row.run for row in read_rows(options.rows)}
    wanted = list(planned(options.repeats, options.first))[:: options.every]
    random.Random(0).shuffle(wanted)  # so that what is there when time is up is a sample of the whole
    missing = [one for one in wanted if one.run.startswith(options.only) and one.run not in there]
    print(f"{len(wanted)} runs planned, {len(missing)} of those asked for are missing")
    _measure(missing, options.rows, options.data, options.processes, time.monotonic() + 60 * options.minutes)


def _measure(missing: list[Planned], rows: Path, data: Path | None, processes: int, until: float) -> None:
    torch.set_num_threads(1)
    if processes == 1:
        for one in missing:
            if time.monotonic() > until:
                return
            _finish(one, rows, data)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        queue = iter(missing)
        running = {pool.submit(measured, one, data): one for one, _ in zip(queue, range(2 * processes), strict=False)}
        while running:
            done = next(as_completed(running))
            add_row(rows, done.result())
            del running[done]
            following = next(queue, None) if time.monotonic() < until else None
            if following is not None:
                running[pool.submit(measured, following, data)] = following


def _finish(one: Planned, rows: Path, data: Path | None) -> None:
    start = time.perf_counter()
    row = measured(one, data)
    add_row(rows, row)
    looks = f"{row.structure}/{row.behavior}/{row.gate}"
    print(f"{row.run}: {looks}, recovered {row.recovered:.2f}, {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()

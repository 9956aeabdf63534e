"""Speed of gradient matching beside breaching and beside a training step, as ratios within one run.

The two sides of a case run in processes of their own and take turns, so that both meet the same machine. The table
goes to docs/benchmarks/speed.md and speed.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from speed_cases import CASES, Case, Side

from medpfl.core.devices import choose_device

HERE = Path(__file__).resolve().parent

COLUMNS = (
    ("case", "case"),
    ("ours_ms", "MedPFL, ms"),
    ("against", "against"),
    ("other_ms", "that, ms"),
    ("ratio", "ratio"),
    ("spread", "quartiles"),
    ("busy_ratio", "ratio of CPU time"),
    ("goal", "goal"),
    ("first_s", "first call, s"),
    ("ours_mb", "MedPFL, MB"),
    ("other_mb", "that, MB"),
)

Timing = dict[str, float]


@dataclass(frozen=True)
class Worker:
    """A running side of a case."""

    process: subprocess.Popen[str]

    def read(self) -> Timing:
        """Its next line; raises RuntimeError if it ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {self.process.wait()}: {self.process.args!r}")
        found: Timing = json.loads(line)
        return found

    def time(self) -> Timing:
        """Asks for one repetition and waits for it."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read()


def main() -> None:
    """Times the cases named on the command line and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda:N")
    parser.add_argument("--short", action="store_true", help="a third of the repetitions")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "benchmarks")
    arguments = parser.parse_args()
    rows, device = [], choose_device(arguments.device)
    for name in arguments.cases:
        case = CASES[name].shortened() if arguments.short else CASES[name]
        rows.append(compared(case, arguments.threads, device))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.out / "speed.csv", rows)
    (arguments.out / "speed.md").write_text(page(rows, arguments.threads, device))


def compared(case: Case, threads: int, device: str) -> dict[str, str]:
    """One row: medians of both sides and the median of the paired ratios with its quartiles."""
    with worker("medpfl", case, threads, device) as ours, worker(case.against, case, threads, device) as other:
        ready, other_ready = ours.read(), other.read()
        if case.against == "breaching" and abs(ready["objective"] - other_ready["objective"]) > 1e-4:
            raise RuntimeError(f"{case.name}: objectives differ, {ready['objective']} and {other_ready['objective']}")
        pairs = [(ours.time(), other.time()) for _ in range(case.repetitions)]
    ratios, busy = (sorted(ratio(case, pair, key) for pair in pairs) for key in ("wall_ms", "busy_ms"))
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "case": case.name,
        "ours_ms": f"{statistics.median(one['wall_ms'] for one, _ in pairs):.3g}",
        "against": case.against,
        "other_ms": f"{statistics.median(two['wall_ms'] for _, two in pairs):.3g}",
        "ratio": f"{statistics.median(ratios):.2f}",
        "spread": f"{quartiles[0]:.2f} to {quartiles[2]:.2f}",
        "busy_ratio": f"{statistics.median(busy):.2f}",
        "goal": f"{'at least' if case.against == 'breaching' else 'at most'} {case.goal:g}",
        "first_s": f"{ready['first_s']:.1f}",
        "ours_mb": f"{pairs[-1][0]['peak_mb']:.0f}",
        "other_mb": f"{pairs[-1][1]['peak_mb']:.0f}",
    }


def ratio(case: Case, pair: tuple[Timing, Timing], key: str) -> float:
    """How many times faster than breaching, or how many times the cost of training."""
    ours, other = pair[0][key], pair[1][key]
    return other / ours if case.against == "breaching" else ours / other


@contextmanager
def worker(side: Side, case: Case, threads: int, device: str) -> Iterator[Worker]:
    """Starts a side and ends it afterwards."""
    command = [sys.executable, str(HERE / "speed_worker.py"), side, case.name, "--threads", str(threads)]
    command += ["--device", device]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    try:
        yield Worker(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    """All rows with the short names of the columns."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [key for key, _ in COLUMNS])
        writer.writeheader()
        writer.writerows(rows)


def page(rows: list[dict[str, str]], threads: int, device: str) -> str:
    """The table with what it means."""
    where = "the CPU" if device == "cpu" else torch.cuda.get_device_name(device)
    lines = [
        "# Speed of gradient matching",
        "",
        f"Measured by `make bench` with PyTorch {torch.__version__} on {platform.machine()}, {threads} CPU threads, "
        f"on {where}, float32, RGB. Times are per candidate and iteration; only ratios travel between machines.",
        "",
        "| " + " | ".join(title for _, title in COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
        *("| " + " | ".join(row[key] for key, _ in COLUMNS) + " |" for row in rows),
        "",
        "Against breaching 0.1.2 the ratio says how many times faster MedPFL is. Both sides take the same objective "
        "(cosine distance over all tensors plus total variation), signed Adam and boxing; at a common image their "
        "cosine distances are checked to agree. breaching runs one victim and one restart, because it runs them one "
        "after the other. Against training the ratio says what one candidate with a target of its own costs per "
        "iteration in training steps (forward and backward pass, per image at batch 8, the plain PyTorch module in "
        "eval mode).",
        "",
        "The ratio is the median over pairs of timings taken in turns, with quartiles. The ratio of CPU time counts "
        "what the processes used and is less disturbed by other work on the machine. The first call of MedPFL "
        "includes whatever is prepared or compiled once. Memory is the peak of the process above what it held once "
        "PyTorch and the plain model were loaded.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""How long vetting takes: reading a checkpoint, its tensors, and a model at work, without a GPU.

    python benchmarks/vetting_speed.py --repeats 3 --out docs/benchmarks/vetting_speed.csv

Prints a row per model: entries, median seconds of each part by the wall clock, and processor seconds of the whole,
which other work on the machine changes little. `--model NAME:CHANNELS:SIZE:CLASSES` (several times) chooses models.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from medpfl.core.tasks import SingleLabel
from medpfl.guards.vetting import vet
from medpfl.models import build_model
from medpfl.models.state import read_tensors

MODELS = ("lenet_dlg:1:32:2", "cnn_fedavg:1:28:2", "resnet18:3:64:2", "resnet18:3:224:2", "vit_b16:3:224:2")


def main() -> None:
    """Measures all models and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="NAME:CHANNELS:SIZE:CLASSES; default: " + ", ".join(MODELS))
    parser.add_argument("--repeats", type=int, default=3, help="median of so many (3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (2)")
    parser.add_argument("--out", type=Path, help="CSV file to write beside the printed table")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows: list[dict[str, object]] = []
    for text in chosen.model or MODELS:
        rows.append(measured(text, chosen.repeats, chosen.threads))
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if chosen.out is not None:
        with chosen.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def measured(text: str, repeats: int, threads: int) -> dict[str, object]:
    """One row: seconds for reading, for tensors alone, and for tensors and behavior together."""
    name, channels, size, classes = text.split(":")
    shape = (int(channels), int(size), int(size))
    generator = torch.Generator().manual_seed(0)
    model = build_model(name, image_shape=shape, task=SingleLabel(int(classes)), generator=generator)
    tensors = {**model.parameters, **model.buffers, **model.counters}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        torch.save(tensors, file)
        reading = seconds(lambda: read_tensors(file), repeats)
    structure = seconds(lambda: vet(tensors), repeats)
    before = time.process_time()
    whole = seconds(lambda: vet(model), repeats)
    processor = (time.process_time() - before) / repeats
    verdict = vet(tensors).verdict
    return {
        "model": name,
        "images": "x".join(map(str, shape)),
        "entries": model.parameter_count,
        "threads": threads,
        "read_seconds": f"{reading:.2f}",
        "tensors_seconds": f"{structure:.2f}",
        "all_seconds": f"{whole:.2f}",
        "all_processor_seconds": f"{processor:.2f}",
        "verdict": verdict,
    }


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall-clock seconds."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    main()

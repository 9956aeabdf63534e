"""How long MedLeak's read-out takes, in passes over the update: `sum` of the same tensors in the same run is 1.

    python benchmarks/medleak_speed.py --out docs/benchmarks

A client trains a tiny net behind a module of so many numbers for one SGD step on 64 images of random brightness, and sends
weights. Then take turns: a sum over all tensors of the update; the read-out of all images; the attack's whole
`reconstruct`, which reads labels besides and for that runs the model behind the module forward and backward. Ratios are
medians over the turns. The same for preparation with a given scale (two simulated rounds with read-out), in units of the client's own step, which
every simulated round contains. One thread.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from torch import nn

from medpfl.attacks.bin_readout import read_out, side_by_side
from medpfl.attacks.crafted import ServerView
from medpfl.attacks.medleak import MedLeak
from medpfl.attacks.module_update import images_of, module_gradients
from medpfl.attacks.updates import settled_at_once
from medpfl.core.domain import Auxiliary, Batch, Knowledge, Observation, Recipe, Reconstruction
from medpfl.core.tasks import SingleLabel
from medpfl.federation import Plain
from medpfl.federation.client import client_step
from medpfl.models import prepare

IMAGES = 64
CASES = {10: ((1, 98, 98), 512), 51: ((1, 224, 224), 512), 100: ((3, 181, 181), 512), 200: ((3, 255, 255), 512)}
"""Millions of numbers in the module -> image shape and bins."""


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call, so that other programs on the machine do not count."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(millions: int, turns: int, queries: int) -> dict[str, float]:
    """One row."""
    (shape, bins), generator = CASES[millions], torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(shape[0] * (shape[1] // 16) ** 2, 2))
    model = prepare(net, name="tiny", image_shape=shape, task=SingleLabel(2))
    brightness = torch.rand((3 * IMAGES, 1, 1, 1), generator=generator)
    images, labels = torch.rand((3 * IMAGES, *shape), generator=generator) * brightness, torch.arange(3 * IMAGES) % 2
    recipe = Recipe(update="weights", batch_size=IMAGES, learning_rate=0.1)
    attack = MedLeak(bins=bins, scale=1e-4, gain=10.0, queries=queries)
    knowledge = Knowledge(auxiliary=Auxiliary(images[IMAGES:], labels[IMAGES:]))
    view = ServerView(model, recipe, "weights", Plain(), IMAGES, "malicious_server", attack.needs(), knowledge)
    broadcast = attack.prepare(view, generator)
    batch = Batch(images[:IMAGES], labels[:IMAGES])
    update, _ = client_step(broadcast.model(0), batch, recipe)
    seen = Observation(broadcast.model(0), update, recipe, "malicious_server", broadcast=broadcast)
    tensors = list(update.trainable.values())

    def images_only() -> Reconstruction:
        assert settled_at_once(seen) is None
        gradients = module_gradients(seen, attack.mode)
        return read_out(seen, side_by_side(images_of(seen, gradients, attack.mode)), gradients[0].notes)

    sums, reads, wholes, steps, prepared = [], [], [], [], []
    for _ in range(turns):
        sums.append(seconds(lambda: [tensor.sum() for tensor in tensors]))
        reads.append(seconds(images_only))
        wholes.append(seconds(lambda: attack.reconstruct([seen], [generator])))
    for _ in range(max(1, turns // 3)):
        steps.append(seconds(lambda: client_step(broadcast.model(0), batch, recipe)))
        prepared.append(seconds(lambda: attack.prepare(view, generator)))
    return {
        "numbers": sum(tensor.numel() for tensor in tensors),
        "queries": queries,
        "sum_ms": median(sums) * 1e3,
        "read_ms": median(reads) * 1e3,
        "read_in_sums": median(read / one for read, one in zip(reads, sums, strict=True)),
        "with_labels_ms": median(wholes) * 1e3,
        "with_labels_in_sums": median(whole / one for whole, one in zip(wholes, sums, strict=True)),
        "step_s": median(steps),
        "prepare_s": median(prepared),
        "prepare_in_steps": median(whole / one for whole, one in zip(prepared, steps, strict=True)),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes the CSV and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--queries", type=int, nargs="+", default=[1])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [measure(millions, options.turns, queries) for millions in options.millions for queries in options.queries]
    options.out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).round(4).to_csv(options.out / "medleak_speed.csv", index=False)
    print(
        "| numbers in the update | queries | sum, ms | images, ms | images, in sums | with labels, ms | with labels, in sums | "
        "client's step, s | preparation, s | preparation in steps | peak memory, GiB |"
    )
    print(f"|{' --- |' * 11}")
    for row in rows:
        print(
            f"| {row['numbers'] / 1e6:.0f} million | {row['queries']} | {row['sum_ms']:.1f} | {row['read_ms']:.1f} | "
            f"**{row['read_in_sums']:.2f}** | {row['with_labels_ms']:.1f} | {row['with_labels_in_sums']:.1f} | "
            f"{row['step_s']:.2f} | {row['prepare_s']:.1f} | {row['prepare_in_steps']:.1f} | {row['peak_gib']:.1f} |"
        )


if __name__ == "__main__":
    main()

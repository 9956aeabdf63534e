"""What batches and local training leave of an attack: images, labels, orders, at stated budgets.

    python benchmarks/realistic_clients.py --parts batches fedavg large --out docs/benchmarks

`batches`: matching attacks on one gradient of 1 to 16 images. `fedavg`: clients that train for several local steps and
epochs with momentum, in order or shuffled; `fedavg_inversion` supposes one order (`known`) or images of their own for
every epoch (`separate`) at the same number of gradients. `large`: `gradinv` on a ResNet18.

PSNR and SSIM are means over all private images, paired with reconstructions by the least summed squared error, with
95 % intervals over victims. Beside them stand the best null baseline (the class mean or nearest of other images, or
noise) and the share of labels recovered. Attack settings were tried on seeds 100 and above, which are not reported.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medpfl.attacks import ATTACKS
from medpfl.core.domain import Batch, Observation, Recipe, Reconstruction
from medpfl.core.seeding import generator
from medpfl.data import Dataset, load_dataset
from medpfl.data.readers.folder import FolderReader
from medpfl.federation.client import client_step
from medpfl.metrics.nulls import null_baselines
from medpfl.metrics.scoring import score
from medpfl.metrics.statistics import bootstrap_mean
from medpfl.metrics.truth import GroundTruth
from medpfl.models import build_model

CHANNELS = {"brain_mri": 1, "covid_cxr": 1, "melanoma": 3}
SIZES = (1, 2, 4, 8, 16)
GRADINV = {"iterations": 150, "total_variation": 1e-2}
LBFGS = {"iterations": 20, "inner_iterations": 20, "restarts": 1, "patience": 100}
FEDAVG = {"iterations": 150, "total_variation": 1e-2}


@dataclass(frozen=True)
class Cell:
    """One row: a client and an attack on it."""

    part: str
    data: str
    model: str
    recipe: Recipe
    attack: str
    settings: dict[str, Any] = field(default_factory=dict)


COLUMNS = ("part", "data", "net", "client", "attack", "victims", "images", "psnr", "psnr_low", "psnr_high", "ssim",
           "null_psnr", "null_ssim", "labels", "gradients", "seconds")  # fmt: skip


def cells(parts: Sequence[str]) -> Iterator[Cell]:
    """All rows in the order in which they are measured."""
    if "batches" in parts:
        for data in ("brain_mri", "melanoma"):
            for size in SIZES:
                yield Cell("batches", data, "cnn3", Recipe(batch_size=size), "gradinv", GRADINV)
            for attack, size in product(("idlg", "cpl", "dlg"), SIZES[:3]):
                yield Cell("batches", data, "lenet_idlg", Recipe(batch_size=size), attack, LBFGS)
    if "large" in parts:
        for size in (1, 4):
            recipe = Recipe(batch_size=size)
            yield Cell("large", "brain_mri", "resnet18_cifar", recipe, "gradinv", {**GRADINV, "iterations": 60})
    if "fedavg" in parts:
        for steps, epochs, shuffle in ((1, 1, False), (4, 1, False), (2, 3, False), (2, 3, True), (1, 5, False)):
            recipe = Recipe(
                update="delta",
                batch_size=2,
                local_steps=steps,
                epochs=epochs,
                shuffle=shuffle,
                learning_rate=0.02,
                momentum=0.9,
            )
            for order in ("known", "separate") if epochs > 1 else ("known",):
                yield Cell("fedavg", "brain_mri", "cnn3", recipe, "fedavg_inversion", {**FEDAVG, "order": order})


def measure(cell: Cell, dataset: Dataset, seed: int, victims: int) -> dict[str, Any]:
    """All victims of one cell, attacked together."""
    shape = tuple(dataset.images.shape[1:])
    model = build_model(
        cell.model, image_shape=shape, task=dataset.task, generator=generator("net", seed, cell.model, dataset.name)
    )
    order = torch.randperm(len(dataset), generator=generator("victims", seed, dataset.name))
    count = cell.recipe.private_images
    observations, truths = [], []
    for victim in range(victims):
        chosen = order[victim * count : (victim + 1) * count]
        batch = Batch(dataset.images[chosen], dataset.targets[chosen])
        update, _ = client_step(model, batch, cell.recipe, generator=generator("client", seed, victim))
        observations.append(Observation(model, update, cell.recipe, "honest_server"))
        truths.append(GroundTruth(batch.images, batch.targets, tuple(dataset.items[place] for place in chosen)))
    others = order[victims * count :]
    attack = ATTACKS[cell.attack].item(**cell.settings)
    started = time.process_time()
    results = attack.reconstruct(observations, [generator("attack", seed, victim) for victim in range(victims)])
    seconds = (time.process_time() - started) / victims
    found, owners, labels, nulls, gradients = [], [], [], [], 0
    for victim, (result, truth) in enumerate(zip(results, truths, strict=True)):
        reconstruction = result if isinstance(result, Reconstruction) else None
        found += score(reconstruction, truth, fallback=torch.full(shape, 0.5))
        owners += [victim] * count
        labels.append(_recall(None if reconstruction is None else reconstruction.labels, truth.labels))
        nulls.append(null_baselines(truth, dataset.images[others], dataset.targets[others], torch.Generator()))
        gradients += 0 if reconstruction is None else reconstruction.gradient_evaluations
    psnr = bootstrap_mean([one.psnr for one in found], owners, seed=0)
    best = {
        name: max(float(torch.cat([getattr(one[kind], name) for one in nulls]).mean()) for kind in nulls[0])
        for name in ("psnr", "ssim")
    }
    return {
        "part": cell.part,
        "data": cell.data,
        "net": cell.model,
        "client": _client(cell.recipe),
        "attack": cell.attack + (f" {cell.settings['order']}" if "order" in cell.settings else ""),
        "victims": victims,
        "images": count,
        "psnr": psnr.mean,
        "psnr_low": psnr.low,
        "psnr_high": psnr.high,
        "ssim": sum(one.ssim for one in found) / len(found),
        "null_psnr": best["psnr"],
        "null_ssim": best["ssim"],
        "labels": sum(labels) / len(labels),
        "gradients": gradients / victims,
        "seconds": seconds,
    }


def _recall(found: Tensor | None, truth: Tensor) -> float:
    """Share of the labels that were recovered, whatever image they stand beside."""
    if found is None:
        return 0.0
    classes = int(max(found.max(), truth.max())) + 1
    counts = [torch.bincount(labels, minlength=classes) for labels in (found, truth)]
    return float(torch.minimum(counts[0], counts[1]).sum()) / len(truth)


def _client(recipe: Recipe) -> str:
    if recipe.update == "gradient":
        return f"one gradient of {recipe.batch_size}"
    kind = "shuffled" if recipe.shuffle else "in order"
    return f"{recipe.epochs} epochs of {recipe.local_steps} steps of {recipe.batch_size}, {kind}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all cells and writes `realistic_clients.md` and `realistic_clients.csv`, after every row."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    datasets: dict[str, Dataset] = {}
    rows: list[dict[str, Any]] = []
    for cell in cells(options.parts):
        if cell.data not in datasets:
            channels: Any = CHANNELS[cell.data]
            reader = FolderReader(path=options.root / cell.data)
            datasets[cell.data] = load_dataset(reader, name=cell.data, size=options.size, channels=channels)
        fits = len(datasets[cell.data]) // 2 // cell.recipe.private_images
        victims = min(options.victims, fits)
        rows.append(measure(cell, datasets[cell.data], options.seed, victims))
        print(_line(rows[-1]), flush=True)
        _write(rows, options)


def _write(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    with (options.out / "realistic_clients.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    head = "| data | net | client | attack | victims | PSNR [95 %] | SSIM | best null PSNR, SSIM | labels | gradients | CPU s |"
    text = [
        "# Realistic clients",
        "",
        "Measured by `python benchmarks/realistic_clients.py` on one CPU thread, untrained nets, images of "
        f"{options.size}x{options.size}. Means over all private images; gradients and CPU seconds per victim. The "
        "budgets are small: what does not come back here may come back with a longer search.",
        "",
        head,
        "|" + " --- |" * (head.count("|") - 1),
        *map(_line, rows),
    ]
    (options.out / "realistic_clients.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def _line(row: dict[str, Any]) -> str:
    interval = "" if row["psnr_low"] is None else f" [{row['psnr_low']:.1f}, {row['psnr_high']:.1f}]"
    return (
        f"| {row['data']} | {row['net']} | {row['client']} | {row['attack']} | {row['victims']} | "
        f"{row['psnr']:.1f}{interval} | {row['ssim']:.2f} | {row['null_psnr']:.1f}, {row['null_ssim']:.2f} | "
        f"{row['labels']:.2f} | {row['gradients']:.0f} | {row['seconds']:.0f} |"
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    default = os.environ.get("MEDPFL_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(default), help="folder of the data sets (MEDPFL_DATA)")
    parser.add_argument("--parts", nargs="+", default=["fedavg", "batches", "large"])
    parser.add_argument("--victims", type=int, default=2, help="clients per row")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

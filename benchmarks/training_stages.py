"""What training does to leakage: runs an audit of stages with its diagnosis and writes one row per cell.

    python benchmarks/training_stages.py examples/training_stages.yaml --out out/training_stages

The audit is resumed where it stopped. Beside the audit's own numbers stand the model's accuracy on images that it was
not trained on (the pool's auxiliary and null parts, with a bootstrap interval over images), the share of the training
images that it has learned, and the medians over victims of the norm of the gradient that
they send and of the first tensor's share of it (the one that sees the image).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from medpfl import load_spec, run_audit, write_report
from medpfl.audit.clients_needed import clients_needed
from medpfl.audit.grid import Cell, cells
from medpfl.audit.materials import Materials
from medpfl.core.domain import Batch, GlobalModel
from medpfl.core.seeding import generator
from medpfl.federation.client import client_step
from medpfl.metrics.statistics import Interval, bootstrap_mean
from medpfl.report.diagnosis import diagnoses
from medpfl.report.diagnosis_wording import brief
from medpfl.report.loading import load_audit

HEADER = (
    "model", "attack", "victims", "held-out accuracy", "training accuracy", "gradient norm", "first tensor's share", "reconstructed",
    "PSNR, dB", "best null, dB", "right labels", "what limits the attack most",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the audit and prints the table; `--table` writes it as Markdown, and beside it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, help="an audit spec with trained models")
    parser.add_argument("--out", type=Path, required=True, help="the audit's output folder, created or resumed")
    parser.add_argument("--workers", type=int, default=None, help="worker processes (default: one per core)")
    parser.add_argument("--table", type=Path, default=None, help="write the table to this file too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    spec = load_spec(options.spec).diagnosed()
    run_audit(spec, options.out, workers=options.workers)
    write_report(options.out)
    grid = cells(spec)
    materials = Materials(spec, options.out / "cache", clients_needed(grid))
    audit = load_audit(options.out)
    found = {cell.id: cell for cell in audit.cells}
    verdicts = {one.cell.id: brief(one) for one in diagnoses(audit)}
    seed = spec.seeds[0]
    rows = []
    for cell in grid:
        measured, model = found[cell.id], materials.model(cell, seed)
        divided = materials.pool(cell.dataset, seed).split
        held_out = _accuracy(materials, cell, model, [*divided.auxiliary, *divided.null])
        learned = _accuracy(materials, cell, model, list(divided.training))
        norms = [_norms(materials, cell, model, victim) for victim in range(cell.victims)]
        null = measured.best_null.psnr if measured.best_null is not None else None
        rows.append(
            (
                cell.model.id,
                cell.attack.id,
                str(measured.victims),
                _interval(held_out, 2),
                f"{learned.mean or 0:.2f}",
                f"{median(norm for norm, _ in norms):.2g}",
                f"{median(share for _, share in norms):.1%}",
                f"{measured.asr.value:.2f} [{measured.asr.low:.2f}, {measured.asr.high:.2f}]",
                _interval(Interval(measured.psnr.value, measured.psnr.low, measured.psnr.high), 1),
                f"{null:.1f}" if null is not None else "-",
                f"{measured.label_accuracy:.2f}" if measured.label_accuracy is not None else "-",
                verdicts.get(cell.id, "-"),
            )
        )
    lines = [f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}", *(f"| {' | '.join(row)} |" for row in rows)]
    print("\n".join(lines))
    if options.table is not None:
        options.table.write_text("\n".join(lines) + "\n", encoding="utf-8")
        quoted = [",".join(f'"{text}"' for text in row) for row in (HEADER, *rows)]
        options.table.with_suffix(".csv").write_text("\n".join(quoted) + "\n", encoding="utf-8")


def _accuracy(materials: Materials, cell: Cell, model: GlobalModel, places: Sequence[int]) -> Interval:
    dataset = materials.dataset(cell.dataset)
    images, targets = dataset.images[list(places)], dataset.targets[list(places)]
    with torch.no_grad():
        right = model.forward(images)[0].argmax(dim=1) == targets
    return bootstrap_mean(right.double().numpy(), range(len(places)), seed=0)


def _norms(materials: Materials, cell: Cell, model: GlobalModel, victim: int) -> tuple[float, float]:
    """The norm of what a victim sends, and that of its first tensor as a share of it."""
    truth: Any = materials.truth(cell, materials.spec.seeds[0], victim)
    batch = Batch(truth.images, truth.labels)
    update = client_step(model, batch, cell.recipe.recipe, generator=generator("norm", victim))[0]
    tensors: list[Tensor] = list(update.trainable.values())
    norm = float(torch.cat([tensor.flatten() for tensor in tensors]).norm())
    return norm, float(tensors[0].norm()) / norm


def _interval(found: Interval, places: int) -> str:
    if found.mean is None:
        return "-"
    spread = f" [{found.low:.{places}f}, {found.high:.{places}f}]" if found.low is not None else ""
    return f"{found.mean:.{places}f}{spread}"


if __name__ == "__main__":
    main()

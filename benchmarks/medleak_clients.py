"""MedLeak against clients' own arithmetic: optimizers, precision, several local steps, what a server may choose.

    python benchmarks/medleak_clients.py --data DATA --table optimizers --seeds 3 --csv medleak_clients.csv
    python benchmarks/medleak_clients.py --csv docs/benchmarks/medleak_clients.csv --page docs/benchmarks/medleak_clients.md

DATA holds `medmnist/pneumoniamnist_subset.npz`. One row per round; rounds that the CSV already holds are not repeated.
An image counts as recovered above 30 dB, one candidate each. Two shares stand beside it: of images alone in their bin
(what one read-out can give at most; from truth), and of images to which some auxiliary image comes as close (the null).
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medpfl.attacks.brightness_bins import alone, brightness
from medpfl.attacks.crafted import ServerView
from medpfl.attacks.medleak import MedLeak
from medpfl.core.domain import Auxiliary, Batch, Knowledge, Observation, Recipe, Reconstruction
from medpfl.core.functional import assignment
from medpfl.data import Dataset, load_dataset
from medpfl.data.readers.medmnist import MedMnistReader
from medpfl.federation import Channel, Plain, SecAggPlus, run_round
from medpfl.metrics.scoring import pairwise_mse
from medpfl.metrics.statistics import success_rate
from medpfl.models import build_model

RECOVERED = 1e-3
BINS = 512


@dataclass(frozen=True)
class Case:
    """One line of a table."""

    table: str
    client: str
    attack: str
    channel: str = "plain"
    body: str = "default"
    images: int = 64
    recipe: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.table}/{self.client}/{self.attack}/{self.channel}/{self.body}/{self.images}"


@dataclass(frozen=True)
class Row:
    """One attacked round."""

    case: str
    seed: int
    images: int
    alone: int
    recovered: int
    null: int
    by_class: str
    seconds: float
    note: str


SGD = {"learning_rate": 0.1}
ADAM = {"optimizer": "adam", "learning_rate": 1e-3}
CLIENTS: dict[str, dict[str, Any]] = {
    "SGD 0.1": SGD,
    "SGD 0.1, momentum 0.9, decay 1e-4": {**SGD, "momentum": 0.9, "weight_decay": 1e-4},
    "Adam 1e-3": ADAM,
    "AdamW 1e-3, decay 0.01": {**ADAM, "optimizer": "adamw", "weight_decay": 0.01},
    "Adam 1e-3, decay 1e-4": {**ADAM, "weight_decay": 1e-4},
    "Adam 1e-2": {**ADAM, "learning_rate": 1e-2},
}
CHANNELS: dict[str, Channel] = {
    "plain": Plain(),
    "secagg_plus, 8 clients": SecAggPlus(clients=8),
    "secagg_plus, 2 clients": SecAggPlus(clients=2),
}


def optimizers() -> Iterator[Case]:
    """Optimizers by precision, behind both channels; the published sizes beside ours in float32."""
    for precision in ("float32", "bfloat16", "float16"):
        for client, recipe in CLIENTS.items():
            if precision != "float32" and client not in ("SGD 0.1", "Adam 1e-3"):
                continue
            named = client if precision == "float32" else f"{client}, {precision}"
            for channel in ("plain", "secagg_plus, 8 clients"):
                yield Case("optimizers", named, "calibrated", channel, recipe={**recipe, "precision": precision})
    for client in ("SGD 0.1", "Adam 1e-3"):
        for channel in ("plain", "secagg_plus, 8 clients"):
            yield Case("optimizers", client, "calibrated", channel, "uniform", recipe=CLIENTS[client])
        yield Case("optimizers", client, "published", recipe=CLIENTS[client], settings=MedLeak.presets["published"])


TABLES = {"optimizers": optimizers}


def played(case: Case, data: Dataset, seed: int) -> Row:
    """One round with private images that are not among the auxiliary ones."""
    started, channel = time.perf_counter(), CHANNELS[case.channel]
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    held, owned = order[: case.images * channel.client_count], order[case.images * channel.client_count :]
    generator = torch.Generator().manual_seed(seed)
    model = build_model("lenet_idlg", image_shape=tuple(data.images.shape[1:]), task=data.task, generator=generator)
    if case.body == "uniform":
        drawn = {name: torch.rand(one.shape, generator=generator) - 0.5 for name, one in model.parameters.items()}
        model = replace(model, parameters=drawn)
    recipe = Recipe(**{"update": "weights", "batch_size": case.images, **case.recipe})
    auxiliary = Auxiliary(data.images[owned], data.targets[owned])
    attack = MedLeak(bins=BINS, queries=1, **case.settings)
    view = ServerView(
        model,
        recipe,
        recipe.update,
        channel,
        case.images,
        "malicious_server",
        attack.needs(),
        Knowledge(auxiliary=auxiliary),
    )
    broadcast = attack.prepare(view, generator)
    batches = [Batch(data.images[part], data.targets[part]) for part in torch.split(held, case.images)]
    clients = [(batch, generator) for batch in batches]
    update = run_round(broadcast, clients, recipe, channel=channel, generator=generator)
    observation = Observation(
        broadcast.model(0), update, recipe, "malicious_server", clients=len(batches), broadcast=broadcast
    )
    (result,) = attack.reconstruct([observation], [generator])
    found = result.images if isinstance(result, Reconstruction) else batches[0].images[:0]
    hits = recovered(batches[0].images, found)
    classes = batches[0].targets
    return Row(
        case=case.name,
        seed=seed,
        images=case.images,
        alone=int(alone(brightness(batches[0].images), broadcast.secret["edges"][0]).sum()),
        recovered=int(hits.sum()),
        null=int((pairwise_mse(batches[0].images, auxiliary.images).amin(dim=1) < RECOVERED).sum()),
        by_class=" ".join(
            f"{int(hits[classes == one].sum())}/{int((classes == one).sum())}" for one in classes.unique()
        ),
        seconds=round(time.perf_counter() - started, 2),
        note=broadcast.notes[0] if broadcast.notes else "",
    )


def recovered(private: Tensor, found: Tensor) -> Tensor:
    """Which private images come back above 30 dB when as many as possible do, one candidate each: bool (N,)."""
    hits = torch.zeros(len(private), dtype=torch.bool)
    if len(found):
        errors = pairwise_mse(private.double(), found.double())
        rows, columns = assignment(errors.clamp_max(RECOVERED))
        hits[rows] = errors[rows, columns] < RECOVERED
    return hits


def page(rows: Sequence[Row]) -> str:
    """The tables as Markdown."""
    text = []
    for table, cases in TABLES.items():
        text.append(
            f"\n## {table.capitalize()}\n\n| client | body | attack | channel | recovered | alone in bin | null |"
        )
        text.append("| --- | --- | --- | --- | --- | --- | --- |")
        for case in cases():
            own = [row for row in rows if row.case == case.name]
            if own:
                text.append(
                    f"| {case.client} | {case.body} | {case.attack} | {case.channel} | {share(own, 'recovered')} | "
                    f"{sum(row.alone for row in own) / sum(row.images for row in own):.3f} | "
                    f"{sum(row.null for row in own) / sum(row.images for row in own):.3f} |"
                )
    return "\n".join(text)


def share(rows: Sequence[Row], column: str) -> str:
    """Share of all images with an interval over rounds."""
    hits = [index < getattr(row, column) for row in rows for index in range(row.images)]
    interval = success_rate(hits, [row.seed for row in rows for _ in range(row.images)], seed=0)
    return f"{interval.value:.3f} [{interval.low:.2f}, {interval.high:.2f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MEDPFL_DATA"), help="folder with medmnist/")
    parser.add_argument("--table", choices=sorted(TABLES), help="which rounds to play")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--seeds", type=int, default=3, help="rounds per case")
    parser.add_argument("--minutes", type=float, default=7.0, help="no new round is begun after so long")
    parser.add_argument("--csv", type=Path, required=True, help="rounds, read and added to")
    parser.add_argument("--page", type=Path, help="Markdown file to write the tables to, below its first line `---`")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = _read(options.csv)
    if options.table:
        _play(options, rows)
    if options.page:
        head = options.page.read_text(encoding="utf-8").split("\n---\n")[0] if options.page.exists() else "# MedLeak"
        options.page.write_text(f"{head}\n---\n{page(rows)}\n", encoding="utf-8")


def _play(options: argparse.Namespace, rows: list[Row]) -> None:
    reader = MedMnistReader(path=Path(options.data, "medmnist", "pneumoniamnist_subset.npz"))
    data, started = load_dataset(reader, name="pneumonia", size=28, channels=1), time.monotonic()
    done = {(row.case, row.seed) for row in rows}
    for seed in range(options.seeds):
        for case in TABLES[options.table]():
            if options.only not in case.name or (case.name, seed) in done:
                continue
            if time.monotonic() - started > 60 * options.minutes:
                return
            row = played(case, data, seed)
            rows.append(row)
            _write(options.csv, rows)
            print(row.case, row.seed, f"{row.recovered}/{row.images}", row.note, flush=True)


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    kinds = {one.name: {"int": int, "float": float}.get(str(one.type), str) for one in fields(Row)}
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def _write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [one.name for one in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    main()

"""MedLeak against clients' own arithmetic: optimizers, precision, several local steps, what a server may choose.

    python benchmarks/medleak_clients.py --data DATA --table optimizers --seeds 3 --csv medleak_clients.csv
    python benchmarks/medleak_clients.py --data DATA --table whose --seeds 3 --csv medleak_clients.csv
    python benchmarks/medleak_clients.py --csv docs/benchmarks/medleak_clients.csv --page docs/benchmarks/medleak_clients.md

DATA holds `medmnist/pneumoniamnist_subset.npz`. One row per round; rounds that the CSV already holds are not repeated.
An image counts as recovered above 30 dB, one candidate each. Two shares stand beside it: of images alone in their bin
(what one read-out can give at most; from truth), and of images to which some auxiliary image comes as close (the null).
In the table `whose` all clients' images are sought, and whether the attack says rightly whose an image is that came back.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tables import markdown, put, read_rows, write_rows
from torch import Tensor

from medpfl.attacks.brightness_bins import alone, brightness
from medpfl.attacks.crafted import ServerView
from medpfl.attacks.medleak import MedLeak
from medpfl.core.domain import Auxiliary, Batch, Knowledge, Observation, Recipe, Reconstruction
from medpfl.core.functional import assignment
from medpfl.data import Dataset, load_dataset
from medpfl.data.readers.medmnist import MedMnistReader
from medpfl.defenses.laplace import Laplace
from medpfl.federation import Channel, Plain, SecAggPlus, SecureSum, run_round
from medpfl.federation.hooks import NO_HOOKS, Hooks
from medpfl.federation.rounds import followed_recipe
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
    also: tuple[str, ...] = ()
    defense: Hooks = NO_HOOKS
    recipe: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What rounds of this case are kept under."""
        return f"{self.table}/{self.client}/{self.attack}/{self.channel}/{self.body}/{self.images}"


@dataclass(frozen=True)
class Row:
    """One attacked round. attributed: images that came back and are said to be of the client that holds them."""

    case: str
    seed: int
    images: int
    alone: int
    recovered: int
    null: int
    by_class: str
    by_step: str
    seconds: float
    note: str
    attributed: int | None = None


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
    "secure_sum, 4 clients": SecureSum(clients=4),
    "secagg_plus, 4 clients": SecAggPlus(clients=4),
    "secure_sum, 8 clients": SecureSum(clients=8),
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


def steps() -> Iterator[Case]:
    """Local steps of 32 images by optimizer and way, behind both channels."""
    clients = {
        "SGD 0.05": {"learning_rate": 0.05},
        "momentum 0.9": {"learning_rate": 0.05, "momentum": 0.9},
        "Adam 1e-3": ADAM,
    }
    for count in (1, 2, 5, 10, 20):
        for client, recipe in clients.items():
            for channel in ("plain", "secagg_plus, 2 clients"):
                both = count > 1 and channel == "plain" and client != "Adam 1e-3"
                for way in ("first_batch", "all_batches") if both else ("auto",):
                    named = f"{client}, {count} step{'s' if count > 1 else ''}"
                    taken = {**recipe, "local_steps": count, "batch_size": 32}
                    yield Case("steps", named, way, channel, images=32 * count, recipe=taken, settings={"steps": way})


def capabilities() -> Iterator[Case]:
    """What a server gains that may choose more than the model, or knows the clients' noise."""
    five = {"learning_rate": 0.05, "local_steps": 5, "batch_size": 32}
    for also in ((), ("recipe",), ("secure_aggregation",)):
        named = " and ".join(("parameters, architecture, models", *also))
        yield Case("capabilities", "Adam 1e-3", named, "secagg_plus, 8 clients", also=also, recipe=ADAM)
        yield Case(
            "capabilities", "SGD 0.05, 5 steps", named, "secagg_plus, 2 clients", images=160, also=also, recipe=five
        )
    for noise in (0.01, 0.1):
        for known in (False, True):
            named = "knows the noise" if known else "does not"
            yield Case(
                "capabilities", f"SGD 0.1, Laplace noise {noise:g} on weights", named, also=("defense",) * known,
                defense=Laplace(scale=noise), recipe=SGD,
            )  # fmt: skip


def whose() -> Iterator[Case]:
    """All clients' images behind an aggregate: one module for all, or units of their own for each."""
    for client, channel, images in (
        ("SGD 0.1", "secure_sum, 4 clients", 16),
        ("SGD 0.1", "secure_sum, 4 clients", 64),
        ("SGD 0.1", "secure_sum, 8 clients", 16),
        ("SGD 0.1", "secagg_plus, 4 clients", 16),
        ("Adam 1e-3", "secure_sum, 4 clients", 16),
    ):
        for mode in ("joint", "apart"):
            yield Case("whose", client, mode, channel, images=images, recipe=CLIENTS[client], settings={"mode": mode})


TABLES = {"optimizers": optimizers, "steps": steps, "capabilities": capabilities, "whose": whose}


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
    attack = MedLeak(**{"bins": BINS, "queries": 1, **case.settings})
    known = case.defense.mechanism() if "defense" in case.also else None
    knowledge = Knowledge(auxiliary=auxiliary, defense=known)
    can = attack.needs() | (set(case.also) - {"defense"})
    view = ServerView(model, recipe, recipe.update, channel, case.images, "malicious_server", can, knowledge)
    broadcast = attack.prepare(view, generator)
    batches = [Batch(data.images[part], data.targets[part]) for part in torch.split(held, case.images)]
    clients = [(batch, generator) for batch in batches]
    update = run_round(broadcast, clients, recipe, hooks=case.defense, channel=channel, generator=generator)
    followed = followed_recipe(broadcast, recipe, case.defense)
    observation = Observation(
        broadcast.model(0), update, followed, "malicious_server", clients=len(batches), broadcast=broadcast
    )
    (result,) = attack.reconstruct([observation], [generator])
    found = result.images if isinstance(result, Reconstruction) else batches[0].images[:0]
    sought = batches[:1] if attack.mode == "separate" else batches
    private, classes = (torch.cat(parts) for parts in zip(*((one.images, one.targets) for one in sought), strict=True))
    pairs = recovered(private, found)
    hits, edges = pairs >= 0, broadcast.secret["edges"].flatten()
    shared = [one.images for one in sought] if attack.mode == "apart" else [private]
    owners = torch.arange(len(private)) // case.images
    told = result.clients if isinstance(result, Reconstruction) and attack.mode == "apart" else None
    return Row(
        case=case.name,
        seed=seed,
        images=len(private),
        alone=sum(int(alone(brightness(one), edges).sum()) for one in shared),
        recovered=int(hits.sum()),
        null=int((pairwise_mse(private, auxiliary.images).amin(dim=1) < RECOVERED).sum()),
        by_class=" ".join(
            f"{int(hits[classes == one].sum())}/{int((classes == one).sum())}" for one in classes.unique()
        ),
        by_step=" ".join(f"{int(one.sum())}/{len(one)}" for one in torch.split(hits, recipe.batch_size)),
        seconds=round(time.perf_counter() - started, 2),
        note=broadcast.notes[0] if broadcast.notes else "",
        attributed=None if told is None else int((told[pairs[hits]] == owners[hits]).sum()),
    )


def recovered(private: Tensor, found: Tensor) -> Tensor:
    """The candidate with which each private image comes back above 30 dB when as many as possible do: (N,), -1 for none."""
    taken = torch.full((len(private),), -1)
    if len(found):
        errors = pairwise_mse(private.double(), found.double())
        rows, columns = assignment(errors.clamp_max(RECOVERED))
        close = errors[rows, columns] < RECOVERED
        taken[rows[close]] = columns[close]
    return taken


def table(rows: Sequence[Row], cases: Sequence[Case]) -> list[str]:
    """The lines of these cases."""
    if any(case.settings.get("mode") for case in cases):
        head = (
            "client",
            "channel",
            "mode",
            "n",
            "recovered",
            "of them attributed rightly",
            "alone in bin",
            "closed form",
            "null",
        )
        return markdown(head, [line for case in cases if (line := _whose(case, rows))])
    head = ("client", "body", "attack", "channel", "n", "recovered", "first step", "by class", "alone in bin", "null")
    return markdown(head, [line for case in cases if (line := _line(case, rows))])


def _line(case: Case, rows: Sequence[Row]) -> list[object]:
    own = [row for row in rows if row.case == case.name]
    if not own:
        return []
    total = sum(row.images for row in own)
    return [
        case.client,
        case.body,
        case.attack,
        case.channel,
        f"{len(own)} x {case.images}",
        share(own),
        parts([row.by_step.split()[0] for row in own]),
        " ".join(parts(one) for one in zip(*(row.by_class.split() for row in own), strict=True)),
        f"{sum(row.alone for row in own) / total:.3f}",
        f"{sum(row.null for row in own) / total:.3f}",
    ]


def _whose(case: Case, rows: Sequence[Row]) -> list[object]:
    own = [row for row in rows if row.case == case.name]
    if not own:
        return []
    total, came = sum(row.images for row in own), sum(row.recovered for row in own)
    told = [row.attributed for row in own if row.attributed is not None]
    clients, images = CHANNELS[case.channel].client_count, case.images
    apart = case.settings["mode"] == "apart"
    expected = (1 - clients / BINS) ** (images - 1) if apart else (1 - 1 / BINS) ** (clients * images - 1)
    return [
        case.client,
        case.channel,
        case.attack,
        f"{len(own)} x {own[0].images}",
        share(own),
        f"{sum(told) / came:.3f}" if told and came else None,
        f"{sum(row.alone for row in own) / total:.3f}",
        f"{expected:.3f}",
        f"{sum(row.null for row in own) / total:.3f}",
    ]


def parts(counts: Sequence[str]) -> str:
    """The share of counts like 3/32 together."""
    pairs = [tuple(map(int, count.split("/"))) for count in counts]
    return f"{sum(found for found, _ in pairs) / sum(number for _, number in pairs):.2f}"


def share(rows: Sequence[Row]) -> str:
    """Share of all images that came back, with an interval over rounds."""
    hits = [index < row.recovered for row in rows for index in range(row.images)]
    interval = success_rate(hits, [row.seed for row in rows for _ in range(row.images)], seed=0)
    spread = "" if interval.low is None else f" [{interval.low:.2f}, {interval.high:.2f}]"
    return f"{interval.mean:.3f}{spread}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MEDPFL_DATA"), help="folder with medmnist/")
    parser.add_argument("--table", choices=sorted(TABLES), help="which rounds to play")
    parser.add_argument("--only", default="", help="cases in whose name this pattern is found")
    parser.add_argument("--seeds", type=int, default=3, help="rounds per case")
    parser.add_argument("--first-seed", type=int, default=0, help="number of the first round")
    parser.add_argument("--minutes", type=float, default=7.0, help="no new round is begun after so long")
    parser.add_argument("--csv", type=Path, required=True, help="rounds, read and added to")
    parser.add_argument("--page", type=Path, help="page whose tables are written anew")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = read_rows(options.csv, Row)
    if options.table:
        _play(options, rows)
    if options.page:
        for name, cases in TABLES.items():
            put(options.page, name, table(rows, list(cases())))


def _play(options: argparse.Namespace, rows: list[Row]) -> None:
    reader = MedMnistReader(path=Path(options.data, "medmnist", "pneumoniamnist_subset.npz"))
    data, started = load_dataset(reader, name="pneumonia", size=28, channels=1), time.monotonic()
    done = {(row.case, row.seed) for row in rows}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for case in TABLES[options.table]():
            if not re.search(options.only, case.name) or (case.name, seed) in done:
                continue
            if time.monotonic() - started > 60 * options.minutes:
                return
            row = played(case, data, seed)
            rows.append(row)
            write_rows(options.csv, rows)
            print(row.case, row.seed, f"{row.recovered}/{row.images}", row.note, flush=True)


if __name__ == "__main__":
    main()

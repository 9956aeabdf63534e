"""Fishing by class over several rounds: how many of a client's images come back, one at a time.

    python benchmarks/fishing_rounds.py --seeds 10 --csv fishing_rounds.csv --page crafted_relatives.md

A client holds `--held` images of six body parts (MedNIST, 32x32) and takes one float32 SGD step a round on `--images` of them:
the same in every round (`same`), or others (`fresh`). The server asks for one class after the other, always in front of
the same untrained LeNet, and inverts what it isolates with L-BFGS (`search: dlg`). Counted are different images above 30
dB so far, and different images that were the only one of the class asked for (at most; from the truth, for scoring only).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from crafted_cases import lenet
from crafted_relatives import RECOVERED, dataset
from tables import markdown, put, read_rows, write_rows
from torch import Tensor

from medpfl.attacks.crafted import ServerView
from medpfl.attacks.fishing import Fishing
from medpfl.core.domain import Auxiliary, Batch, GlobalModel, Knowledge, Observation, Recipe, Reconstruction
from medpfl.core.seeding import generator
from medpfl.data import Dataset
from medpfl.federation import Plain, run_round
from medpfl.metrics.scoring import pairwise_mse
from medpfl.metrics.statistics import bootstrap_mean


@dataclass(frozen=True)
class Row:
    """After so many rounds: different images that came back, that could at most, and wrong candidates."""

    batches: str
    held: int
    images: int
    seed: int
    rounds: int
    read: int
    at_most: int
    wrong: int


def played(data: Dataset, batches: str, options: argparse.Namespace, seed: int) -> Iterator[Row]:
    """All rounds of one client."""
    held, size = options.images if batches == "same" else options.held, options.images
    order = torch.randperm(len(data), generator=generator("division", seed))
    own, auxiliary = order[:held], Auxiliary(data.images[order[held:]], data.targets[order[held:]])
    model, draws = lenet(data, 0, seed), generator("batches", seed)
    read, alone, wrong = torch.zeros(held, dtype=torch.bool), torch.zeros(held, dtype=torch.bool), 0
    for number in range(options.rounds):
        taken, label = torch.randperm(held, generator=draws)[:size], number % data.task.classes
        batch = Batch(data.images[own[taken]], data.targets[own[taken]])
        asked = batch.targets == label
        if int(asked.sum()) == 1:
            alone[taken[asked]] = True
        found = fished(model, batch, auxiliary, label, seed * 1000 + number)
        if len(found):
            errors = pairwise_mse(found.double(), data.images[own].double())
            came = errors.amin(dim=1) < RECOVERED
            read[errors.argmin(dim=1)[came]] = True
            wrong += int((~came).sum())
        yield Row(batches, held, size, seed, number + 1, int(read.sum()), int(alone.sum()), wrong)


def fished(model: GlobalModel, batch: Batch, auxiliary: Auxiliary, label: int, seed: int) -> Tensor:
    """What comes back of one round, none or one image."""
    attack, recipe = (
        Fishing(label=label, search="dlg"),
        Recipe(update="weights", learning_rate=0.1, batch_size=len(batch.targets)),
    )
    knowledge, draws = Knowledge(auxiliary=auxiliary), generator("round", seed)
    view = ServerView(
        model, recipe, "weights", Plain(), recipe.batch_size, "malicious_server", attack.needs(), knowledge
    )
    broadcast = attack.prepare(view, draws)
    update = run_round(broadcast, [(batch, draws)], recipe, channel=Plain(), generator=draws)
    seen = Observation(broadcast.model(0), update, recipe, "malicious_server", broadcast=broadcast)
    (result,) = attack.reconstruct([seen], [draws])
    if not isinstance(result, Reconstruction):
        raise SystemExit(f"fishing failed: {result.reason}")
    return result.images


def table(rows: Sequence[Row], shown: Sequence[int]) -> list[str]:
    """Means over clients with 95% intervals after some numbers of rounds."""
    lines: list[list[object]] = []
    for batches, held in sorted({(row.batches, row.held) for row in rows}, reverse=True):
        for rounds in shown:
            own = [row for row in rows if (row.batches, row.held, row.rounds) == (batches, held, rounds)]
            if own:
                found = bootstrap_mean([row.read for row in own], [row.seed for row in own], seed=0)
                most, wrong = (
                    sum(values) / len(own) for values in zip(*((r.at_most, r.wrong) for r in own), strict=True)
                )
                spread = "" if found.low is None else f" [{found.low:.1f}, {found.high:.1f}]"
                lines.append(
                    [batches, held, own[0].images, rounds, len(own), f"{found.mean:.1f}{spread}", f"{most:.1f}", f"{wrong:.1f}"]
                )  # fmt: skip
    return markdown(
        ("batches", "held", "images a round", "rounds", "clients", "different images read [95%]", "at most", "wrong candidates"),
        lines,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Plays what the CSV does not hold yet, and writes the table into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="clients")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--held", type=int, default=64, help="images of a client whose batches are fresh")
    parser.add_argument("--images", type=int, default=16, help="of a round")
    parser.add_argument("--shown", type=int, nargs="+", default=[6, 12, 24], help="numbers of rounds in the table")
    parser.add_argument("--csv", type=Path, required=True, help="rows, read and added to")
    parser.add_argument("--page", type=Path, help="page whose table is written anew")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, data = read_rows(options.csv, Row), dataset("bodyparts")
    for seed in range(options.seeds):
        for batches in ("same", "fresh"):
            if not any((row.batches, row.seed) == (batches, seed) for row in rows):
                rows += played(data, batches, options, seed)
                write_rows(options.csv, rows)
                print(rows[-1], flush=True)
    if options.page:
        put(options.page, "fishing", table(rows, options.shown))


if __name__ == "__main__":
    main()

"""SRATTA on one aggregated round: images read out, images grouped by client, and whether the groups are right.

    python benchmarks/sratta.py --rounds 10 --csv sratta.csv --page loki_ares_scale_mia_sratta.md

Untrained nets of two dense layers with 1,000 units, five clients behind `secure_sum`, float32 SGD, several local steps.
`alone` is the share of images that alone activate a unit of the net that was sent (from the truth, for scoring only),
`read` the share that came back above 30 dB, `false` the number of candidates per round that are nobody's image. `grouped` is
the share of images in a group, `pure` the share of pairs within groups that are of one client, and `by chance` what it
would be for pairs drawn at random.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from crafted_cases import dense_net
from crafted_relatives import RECOVERED, dataset
from tables import markdown, put
from torch import Tensor

from medpfl.attacks.sratta import Sratta
from medpfl.core.domain import Batch, Broadcast, Observation, Recipe, Reconstruction
from medpfl.core.seeding import generator
from medpfl.data import Dataset
from medpfl.federation import SecureSum, run_round
from medpfl.metrics.scoring import pairwise_mse

UNITS = 1000
COLUMNS = (
    "data",
    "clients",
    "batch",
    "steps",
    "rate",
    "rounds",
    "alone",
    "read",
    "false",
    "grouped",
    "pure",
    "by_chance",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table row by row as it is measured, and writes it as CSV."""
    options = _options(arguments)
    torch.set_num_threads(1)
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    rows = []
    for name in options.data:
        data = dataset(name)
        for batch in options.batches:
            for rate in options.rates:
                rows.append(_row(name, data, batch, rate, options))
                print(f"| {' | '.join(rows[-1][column] for column in COLUMNS)} |", flush=True)
    if options.csv:
        with Path(options.csv).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    if options.page:
        put(options.page, "sratta", markdown(COLUMNS, [list(row.values()) for row in rows]))


def _row(name: str, data: Dataset, batch: int, rate: float, options: argparse.Namespace) -> dict[str, str]:
    recipe = Recipe(update="weights", learning_rate=rate, batch_size=batch, local_steps=options.steps)
    totals = torch.stack([_play(data, recipe, options.clients, seed) for seed in range(options.rounds)]).sum(dim=0)
    held = recipe.private_images
    images = options.clients * held * options.rounds
    alone, read, false, grouped, pairs, right = totals.tolist()
    values: dict[str, object] = {
        "data": name,
        "clients": options.clients,
        "batch": batch,
        "steps": options.steps,
        "rate": f"{rate:g}",
        "rounds": options.rounds,
        "alone": f"{alone / images:.3f}",
        "read": f"{read / images:.3f}",
        "false": f"{false / options.rounds:.1f}",
        "grouped": f"{grouped / images:.3f}",
        "pure": f"{right / pairs:.3f} of {pairs:.0f}" if pairs else "",
        "by_chance": f"{(held - 1) / (options.clients * held - 1):.3f}",
    }
    return {key: str(value) for key, value in values.items()}


def _play(data: Dataset, recipe: Recipe, clients: int, seed: int) -> Tensor:
    """Numbers of one round: images alone in a unit, read, false candidates, grouped, pairs in groups, right pairs."""
    order = torch.randperm(len(data), generator=generator("division", seed))[: clients * recipe.private_images]
    batches = [Batch(data.images[part], data.targets[part]) for part in torch.split(order, recipe.private_images)]
    model, draws = dense_net(data, UNITS, seed), generator("round", seed)
    update = run_round(
        Broadcast((model,)),
        [(one, draws) for one in batches],
        recipe,
        channel=SecureSum(clients=clients),
        generator=draws,
    )
    seen = Observation(model, update, recipe, "honest_server", clients=clients)
    (result,) = Sratta().reconstruct([seen], [draws])
    if not isinstance(result, Reconstruction):
        raise SystemExit(f"sratta failed: {result.reason}")
    private = data.images[order]
    values = private.flatten(1) @ model.parameters["1.weight"].T + model.parameters["1.bias"]
    alone = (values > 0)[:, (values > 0).sum(dim=0) == 1].any(dim=1).sum()
    if not len(result.images) or result.clients is None:
        return torch.tensor([float(alone), 0, 0, 0, 0, 0])
    errors = pairwise_mse(result.images.double(), private.double())
    true = errors.amin(dim=1) < RECOVERED
    owners = errors.argmin(dim=1) // recipe.private_images
    same = (result.clients[:, None] == result.clients) & (result.clients >= 0)[:, None]
    pairs = torch.triu(same, diagonal=1)
    right = pairs & (owners[:, None] == owners) & true[:, None] & true
    counts = [alone, true.sum(), (~true).sum(), (result.clients >= 0).sum(), pairs.sum(), right.sum()]
    return torch.tensor([float(count) for count in counts])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", nargs="+", default=["bodyparts", "pneumonia", "skin"])
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 8], help="images per local step")
    parser.add_argument("--steps", type=int, default=5, help="local steps of each client")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.02, 0.1], help="learning rates")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--csv", metavar="FILE", help="where to write the table")
    parser.add_argument("--page", type=Path, help="page whose table is written anew")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

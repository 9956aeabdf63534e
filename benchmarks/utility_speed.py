"""What measuring the price of defenses takes: federations under five defenses, and clients in a loop or stacked.

    python benchmarks/utility_speed.py --out docs/benchmarks/utility_speed.csv

One round of a federation of `--clients` clients with so many training images of 28x28 is trained under each defense and
its processor seconds taken (`--repeats` rounds, the mean), which other work on the machine changes little. `total` is
what 5 defenses x 4 strengths x 3 seeds with `--rounds` rounds over `--told` images take on two cores, an image costing
what it cost here: the sum over defenses times 12, and the
two baselines (no defense, clients alone: as much as three federations each), evenly on two cores. A strength or a seed
changes no cost.

The second table has the training of a round's clients (no defense, `update: delta`): one after the other, as federations
do it, and stacked by `torch.func.vmap`, for all clients of a round and for those of three runs together.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.seeding import generator
from medpfl.core.tasks import SingleLabel
from medpfl.defenses import DEFENSES, Defense
from medpfl.federation.client import client_step
from medpfl.federation.federated import FederationConfig, federate, fitted
from medpfl.models import build_model

DEFENSES_MEASURED = ("laplace", "gaussian", "clip", "top_k", "dp_sgd")
STRENGTHS, SEEDS, CORES = 4, 3, 2


def main() -> None:
    """Measures and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="of the zoo, several times; default lenet_dlg, cnn3")
    parser.add_argument(
        "--images", type=int, default=320, help="training images of all clients in what is measured (320)"
    )
    parser.add_argument("--told", type=int, default=2450, help="training images that the total is told for (2450)")
    parser.add_argument("--clients", type=int, default=4, help="clients (4)")
    parser.add_argument("--rounds", type=int, default=20, help="rounds that the total is told for (20)")
    parser.add_argument("--repeats", type=int, default=1, help="rounds that are measured (1)")
    parser.add_argument(
        "--update", default="gradient", choices=["gradient", "delta"], help="what clients send (gradient)"
    )
    parser.add_argument("--out", type=Path, help="CSV file to write beside the printed tables")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for name in chosen.model or ("lenet_dlg", "cnn3"):
        model = build_model(name, image_shape=(1, 28, 28), task=SingleLabel(2), generator=generator("model", 0))
        clients = drawn_clients(chosen.images, chosen.clients)
        spent = {
            defense: round_seconds(model, clients, DEFENSES[defense].item(), chosen.update, chosen.repeats)
            for defense in ("none", *DEFENSES_MEASURED)
        }
        baselines = 2 * SEEDS * spent["none"]
        grid = STRENGTHS * SEEDS * sum(spent[defense] for defense in DEFENSES_MEASURED)
        total = chosen.rounds * (grid + baselines) / CORES * chosen.told / chosen.images
        for defense, seconds in spent.items():
            rows.append({"model": name, "defense": defense, "processor_seconds_per_round": f"{seconds:.2f}"})
            print(f"{name} {defense}: {seconds:.2f} processor seconds a round", flush=True)
        rows.append(
            {"model": name, "defense": "total on 2 cores, minutes", "processor_seconds_per_round": f"{total / 60:.1f}"}
        )
        print(
            f"{name}: 5 defenses x 4 strengths x 3 seeds, {chosen.rounds} rounds of {chosen.told} images: {total / 60:.1f} minutes on 2 cores"
        )
        for kind, milliseconds in stacked(model).items():
            rows.append({"model": name, "defense": kind, "processor_seconds_per_round": f"{milliseconds / 1000:.5f}"})
            print(f"{name} {kind}: {milliseconds:.2f} processor milliseconds per client and local step", flush=True)
    if chosen.out is not None:
        with chosen.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def drawn_clients(images: int, clients: int) -> list[Batch]:
    """Random images in equal parts: their content does not matter for the time."""
    stream = generator("images", 0)
    sizes = [images // clients + (number < images % clients) for number in range(clients)]
    return [
        Batch(torch.rand((size, 1, 28, 28), generator=stream), torch.randint(2, (size,), generator=stream))
        for size in sizes
    ]


def round_seconds(model: GlobalModel, clients: list[Batch], defense: Defense, update: str, repeats: int) -> float:
    """Processor seconds of one round."""
    config = FederationConfig(rounds=repeats)
    recipe = config.recipe(Recipe(update="gradient" if update == "gradient" else "delta"))
    few = [Batch(batch.images[:32], batch.targets[:32]) for batch in clients]
    federate(defense.model(model), few, recipe, config, partial(generator, "speed"), hooks=defense)
    started = time.process_time()
    federate(defense.model(model), clients, recipe, config, partial(generator, "speed"), hooks=defense)
    return (time.process_time() - started) / repeats


def stacked(model: GlobalModel, clients: int = 4, runs: int = 3, steps: int = 8) -> dict[str, float]:
    """Processor milliseconds per client and local step of 16 images, one after the other and stacked."""
    recipe = replace(fitted(FederationConfig().recipe(Recipe(update="delta")), 16 * steps), shuffle=False)
    batches = drawn_clients(16 * steps * clients * runs, clients * runs)

    def trained(images: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        update, _ = client_step(model, Batch(images, targets), recipe, generator=generator("none"))
        return dict(update.trainable)

    def loop() -> None:
        for batch in batches[:clients]:
            trained(batch.images, batch.targets)

    def together(count: int) -> Callable[[], object]:
        images = torch.stack([batch.images for batch in batches[:count]])
        targets = torch.stack([batch.targets for batch in batches[:count]])
        return lambda: torch.func.vmap(trained)(images, targets)

    return {
        "loop": milliseconds(loop) / clients / steps,
        f"stacked, {clients} clients": milliseconds(together(clients)) / clients / steps,
        f"stacked, {clients * runs} clients": milliseconds(together(clients * runs)) / clients / runs / steps,
    }


def milliseconds(work: Callable[[], object]) -> float:
    """Processor milliseconds of the second call."""
    work()
    started = time.process_time()
    work()
    return (time.process_time() - started) * 1000


if __name__ == "__main__":
    main()

"""A bound on the whole update against MedLeak behind secure aggregation, and what it costs honest training.

    python benchmarks/medleak_bound.py --data DATA --csv docs/benchmarks/medleak_bound.csv \
        --page docs/benchmarks/medleak_bound.md

DATA holds `medmnist/pneumoniamnist_subset.npz`. `attack`: rounds as in `medleak_clients.py`, by a server that knows the
bound and calibrates its module for it. `honest`: the lengths of updates without any attack, before training and after, and
the AUC of federations that train under the bound. Rows that the CSV file has already are not measured again.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from statistics import mean

import torch
from medleak_clients import SGD, Case, played
from tables import markdown, read_rows, write_rows

from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.seeding import generator
from medpfl.data import Dataset, MedMnistReader, load_dataset
from medpfl.defenses import Clip, DeltaBound
from medpfl.federation.client import client_step
from medpfl.federation.federated import FederationConfig, federate
from medpfl.federation.hooks import NO_HOOKS, Hooks
from medpfl.metrics.statistics import success_rate
from medpfl.metrics.utility import area_under_curve
from medpfl.models import build_model

BOUNDS = (inf, 1000.0, 100.0, 10.0, 1.0, 0.1)
ATTACKED = "secagg_plus, 8 clients"
ROUNDS, CLIENTS, TRAINED, STEP = 20, 4, 1024, 16
"""Of a federation: rounds, clients, training images of all of them, and images per local step."""


@dataclass(frozen=True)
class Row:
    """One measured value. value: images that came back of `images`, the length of an update, or an AUC."""

    kind: str
    body: str
    channel: str
    bound: float
    pinned: int
    may: str
    seed: int
    value: float
    images: int = 0


def bounded(bound: float, pinned: bool = True) -> Hooks:
    """The defense; none without a bound."""
    if bound == inf:
        return NO_HOOKS
    return DeltaBound(bound=bound) if pinned else Clip(bound=bound)


def attacks() -> Iterator[tuple[Case, Row]]:
    """Rounds to attack, each with the row that its result goes into."""
    told: list[tuple[str, str, float, bool, tuple[str, ...]]] = [
        *(("default", ATTACKED, bound, True, ()) for bound in BOUNDS),
        *(("default", "plain", bound, True, ()) for bound in (inf, 1.0, 0.1)),
        *(("default", ATTACKED, bound, pinned, ("recipe",)) for bound in (10.0, 1.0) for pinned in (True, False)),
    ]
    for body, channel, bound, pinned, may in told:
        case = Case(
            "bounds",
            f"{bound:g}",
            "calibrated",
            channel,
            body,
            also=("defense", *may),
            recipe=SGD,
            defense=bounded(bound, pinned),
        )
        yield case, Row("attack", body, channel, bound, int(pinned), " ".join(may), 0, 0.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the CSV file lacks, then writes the page."""
    options = _options(arguments)
    torch.set_num_threads(1)
    reader = MedMnistReader(path=Path(options.data, "medmnist", "pneumoniamnist_subset.npz"))
    data, started = load_dataset(reader, name="pneumonia", size=28, channels=1), time.monotonic()
    rows = read_rows(options.csv, Row)
    for row in _missing(options, data, rows):
        rows.append(row)
        write_rows(options.csv, rows)
        print(row, flush=True)
        if time.monotonic() - started > 60 * options.minutes:
            break
    if options.page:
        options.page.write_text(_page(rows), encoding="utf-8")


def _missing(options: argparse.Namespace, data: Dataset, rows: Sequence[Row]) -> Iterator[Row]:
    known = {(row.kind, row.body, row.channel, row.bound, row.pinned, row.may, row.seed) for row in rows}
    for seed in range(options.seeds):
        for bound in BOUNDS:
            if ("auc", "default", "", bound, 1, "", seed) not in known:
                yield from _honest(data, "default", bound, seed)
        for case, row in attacks():
            if ("attack", row.body, row.channel, row.bound, row.pinned, row.may, seed) not in known:
                found = played(case, data, seed)
                yield replace(row, seed=seed, value=float(found.recovered), images=found.images)


def _honest(data: Dataset, body: str, bound: float, seed: int) -> Iterator[Row]:
    """The AUC of a federation under the bound; without one also how long its clients' updates are."""
    order = torch.randperm(len(data), generator=generator("bound", seed))
    model = _net(data, seed)
    parts = order[:TRAINED].chunk(CLIENTS)
    clients = [Batch(data.images[part], data.targets[part]) for part in parts]
    config = FederationConfig(rounds=ROUNDS, clients=CLIENTS, batch_size=STEP)
    recipe = config.recipe(Recipe(update="weights", learning_rate=SGD["learning_rate"]))
    trained = federate(
        model, clients, recipe, config, lambda *keys: generator("federation", seed, *keys), hooks=bounded(bound)
    )
    rest = order[TRAINED : TRAINED + 1024]
    with torch.no_grad():
        output = trained.forward(data.images[rest])[0]
    yield Row("auc", body, "", bound, 1, "", seed, area_under_curve(output.numpy(), data.targets[rest].numpy()))
    if bound == inf:
        once = Recipe(update="delta", learning_rate=SGD["learning_rate"], batch_size=64)
        whole = replace(once, batch_size=STEP, local_steps=TRAINED // CLIENTS // STEP)
        for when, net in (("before", model), ("after", trained)):
            for kind, taken in (("one step", once), ("one pass", whole)):
                for place, part in enumerate(order[-8 * taken.private_images :].chunk(8)):
                    batch = Batch(data.images[part], data.targets[part])
                    update, _ = client_step(net, batch, taken, generator=generator("length", seed, place))
                    length = float(torch.cat([tensor.flatten() for tensor in update.trainable.values()]).norm())
                    yield Row(f"{kind}, {when}", body, "", bound, 1, f"client {place}", seed, length)


def _net(data: Dataset, seed: int) -> GlobalModel:
    model = build_model(
        "lenet_idlg", image_shape=tuple(data.images.shape[1:]), task=data.task, generator=generator("net", seed)
    )
    return replace(model, parameters={name: tensor.detach() for name, tensor in model.parameters.items()})


INTRODUCTION = """# A bound on the update against MedLeak

`delta_bound` (clients scale their whole update down to a norm of at most the bound before it enters the channel, and train as
agreed whatever the server says) against `medleak` behind SecAgg+ with 8 clients; PneumoniaMNIST at 28x28, LeNet of iDLG, 64
images a round, one SGD step at 0.1, 512 units, one query, {seeds} rounds. The server knows the bound and calibrates its module
on rounds that it plays through under it. Recovered: share of the victim's images above 30 dB, one candidate each [95 %
interval over rounds].

    python benchmarks/medleak_bound.py --data DATA --csv docs/benchmarks/medleak_bound.csv \\
        --page docs/benchmarks/medleak_bound.md

Honest: {rounds} rounds of a federation of {clients} clients with {trained} images together, batches of {step}, one pass a round, SGD at
0.1, weights sent, under the same bound; AUC on 1,024 other images, mean of {seeds} seeds (lowest to highest).

What it shows: a bound stops the module only where it is near the length of honest updates (1.9 at most here). A bound of 1
costs honest training nothing and leaves one image in fifteen; at 10, far above any honest update, a server that calibrates for
the bound still reads four in five, where modules of a fixed size are stopped. Against such a server pinning the recipe
adds nothing, because it makes the module fill the bound at any learning rate; it does against modules of a fixed size, which a
higher learning rate lifts to the bound. In the plain channel no bound helps: what is read in full precision can be scaled
back. Both results are of one architecture and one kind of image.
"""


def _page(rows: Sequence[Row]) -> str:
    seeds = len({row.seed for row in rows})
    lines = [INTRODUCTION.format(seeds=seeds, rounds=ROUNDS, clients=CLIENTS, trained=TRAINED, step=STEP)]
    table = []
    for bound in BOUNDS:
        cells = [_share(rows, channel, bound, 1, "") for channel in (ATTACKED, "plain")]
        own = [row.value for row in rows if row.kind == "auc" and row.bound == bound]
        honest = f"{mean(own):.3f} ({min(own):.3f} to {max(own):.3f})" if own else ""
        table.append(["none" if bound == inf else f"{bound:g}", *cells, honest])
    lines += markdown(["bound", f"recovered, {ATTACKED}", "recovered, plain channel", "AUC of honest training"], table)
    lines += [
        "",
        "The server may also choose the learning rate (capability `recipe`), behind SecAgg+ with 8 clients:",
        "",
    ]
    pinned = [
        [f"{bound:g}", *(_share(rows, ATTACKED, bound, number, "recipe") for number in (0, 1))] for bound in (10.0, 1.0)
    ]
    lines += markdown(["bound", "recipe not pinned (`clip`)", "recipe pinned (`delta_bound`)"], pinned)
    lines += ["", "Lengths of honest updates without a bound (L2 norm of the change of weights; median, largest):", ""]
    lengths = []
    for kind in dict.fromkeys(row.kind for row in rows if row.kind.startswith("one")):
        own = sorted(row.value for row in rows if row.kind == kind)
        lengths.append([kind, f"{own[len(own) // 2]:.2f}", f"{own[-1]:.2f}", len(own)])
    lines += markdown(["update of", "median", "largest", "n"], lengths)
    return "\n".join(lines) + "\n"


def _share(rows: Sequence[Row], channel: str, bound: float, pinned: int, may: str) -> str:
    wanted = ("attack", channel, bound, pinned, may)
    own = [row for row in rows if (row.kind, row.channel, row.bound, row.pinned, row.may) == wanted]
    if not own:
        return ""
    hits = [index < row.value for row in own for index in range(row.images)]
    found = success_rate(hits, [row.seed for row in own for _ in range(row.images)], seed=0)
    return f"{found.mean:.3f}" + ("" if found.low is None else f" [{found.low:.2f}, {found.high:.2f}]")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MEDPFL_DATA"), help="folder with medmnist/")
    parser.add_argument("--seeds", type=int, default=3, help="rounds, and federations, of each setting")
    parser.add_argument("--minutes", type=float, default=7.0, help="nothing new is begun after so long")
    parser.add_argument("--csv", type=Path, required=True, help="rows, read and added to")
    parser.add_argument("--page", type=Path, help="page to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

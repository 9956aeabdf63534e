"""How many private images MedLeak reads out of one round, against how many can be read in closed form.

    python benchmarks/medleak.py --out docs/benchmarks                  # all parts
    python benchmarks/medleak.py --out docs/benchmarks --parts peeling  # one; rows that are not measured again are kept

Parts: `bins` (how many images are alone in their bin, for several ways to place bins, no rounds), `closed` (one query: what the
read-out loses of them, per channel and body), `peeling` (several queries). A client takes one float32 SGD step and
sends weights; the other clients got a dead module, so that only the module's tensors need to go through a channel.
The server's images are half of the data without duplicates, the clients' the other half. Scales are calibrated by the
attack on its own images: in `closed` for the first of the units and every division, in `peeling` for every division.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from medleak_data import FILES, Division, augmented, division, net, sets
from medleak_page import Row, key, known, write
from torch import Tensor

from medpfl.attacks.crafted import ServerView
from medpfl.attacks.front import BIAS, WEIGHT
from medpfl.attacks.medleak import MedLeak
from medpfl.attacks.module_readout import ModuleGradient, read_module
from medpfl.attacks.query_bins import Pattern, Quantiles, QueryBins, query_bins
from medpfl.core.domain import (
    Auxiliary,
    Batch,
    Broadcast,
    GlobalModel,
    Knowledge,
    Observation,
    Recipe,
    Update,
)
from medpfl.core.functional import assignment
from medpfl.core.seeding import generator
from medpfl.data import PhantomReader, load_dataset
from medpfl.federation import Channel, Plain, SecAggPlus, SecureSum
from medpfl.federation.client import client_step
from medpfl.metrics.scoring import pairwise_mse
from medpfl.metrics.statistics import success_rate

RECOVERED = 1e-3
"""Mean squared error of 30 dB."""

CLIENTS = 8
CHANNELS: dict[str, Channel] = {
    "plain": Plain(),
    "secure_sum": SecureSum(clients=CLIENTS),
    "secagg_plus": SecAggPlus(clients=CLIENTS),
}
BINS: dict[str, tuple[Pattern, Quantiles]] = {
    "empirical": ("smooth", "empirical"),
    "gaussian": ("smooth", "gaussian"),
    "smoothed": ("smooth", "smoothed"),
    "even, smoothed": ("even", "smoothed"),
}
"""Ways to place the bins of one query."""

DIVISIONS_OF_BINS = 40
"""Divisions in which only bins are counted, with ten batches each."""

DIVISIONS = 2
"""Divisions of the data, each with a net and a module of its own; batches are spread over them."""


@dataclass(frozen=True)
class Round:
    """One client's batch: which images came back (one candidate each), with which PSNR, and which can in closed form."""

    came: Tensor
    psnr: Tensor
    alone: Tensor
    near: Tensor


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the chosen parts and writes `medleak.md` and `medleak.csv`."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    rows = {row.key: row for row in known(options.out)}
    options.have = set(rows) if options.missing else set()
    for part in options.parts:
        for row in {"bins": _bins, "closed": _closed, "peeling": _peeling}[part](options):
            rows[row.key] = row
            write(list(rows.values()), options.out)
            print(f"{time.process_time() - started:5.0f} s  {row}", flush=True)


def _bins(options: argparse.Namespace) -> Iterator[Row]:
    """No rounds, only how images fall into bins that were made from others, in many divisions of the data."""
    divided = [(name, data, len(data) // 2) for name, data in sets(options.data)]
    if options.phantoms:
        films = load_dataset(PhantomReader(kind="chest", count=12000, resolution=28), name="films", size=28, channels=1)
        divided.append(("chest phantoms", films, 10000))
    for name, data, owned in divided:
        for setting, (pattern, quantiles) in BINS.items():
            for units in options.units:
                sizes = [size for size in options.images if key("bins", name, size, units, setting) not in options.have]
                alone: dict[int, list[Tensor]] = {size: [] for size in sizes}
                for seed in range(DIVISIONS_OF_BINS if sizes else 0):
                    order = torch.randperm(len(data), generator=generator("bins", name, seed))
                    draws = generator("query", name, seed)
                    bins = query_bins(pattern, 1, units, data.images[order[:owned]], draws, quantiles)
                    rest = data.images[order[owned:]]
                    for size in sizes:
                        draws = generator("draws", name, size, seed)
                        batches = [rest[torch.randperm(len(rest), generator=draws)[:size]] for _ in range(10)]
                        alone[size].append(torch.cat([bins.alone(batch) for batch in batches]))
                for size, found in alone.items():
                    rounds = [Round(one, one[:0].double(), one, one[:0]) for one in found]
                    yield _row("bins", name, rounds, size, units, setting)


def _closed(options: argparse.Namespace) -> Iterator[Row]:
    for name, data in sets(options.data):
        for body in options.bodies:
            for size in options.images:
                scales: dict[tuple[str, int], float] = {}
                for units in options.units:
                    keys = {key("closed", name, size, units, "one query", channel, body) for channel in CHANNELS}
                    if keys <= options.have:
                        continue
                    found: dict[str, list[Round]] = {channel: [] for channel in CHANNELS}
                    for seed in range(DIVISIONS):
                        split = division(data, seed)
                        for shared in (("plain", "secure_sum"), ("secagg_plus",)):
                            last = CHANNELS[shared[-1]]
                            scale: Any = scales.get((shared[-1], seed), "auto")
                            attack = MedLeak(bins=units, queries=1, scale=scale)
                            sent = _sent(attack, split, net(data, body, seed), last, size)
                            scales[shared[-1], seed] = float(
                                sent.model(0).parameters[WEIGHT].double().sum(dim=1).mean()
                            )
                            for channel, rounds in _played(sent, split, shared, size, _share(options)):
                                found[channel] += rounds
                    for channel, rounds in found.items():
                        yield _row("closed", name, rounds, size, units, "one query", body=body, channel=channel)


def _peeling(options: argparse.Namespace) -> Iterator[Row]:
    cases = [
        *(("plain", size, "auto", "smooth", off_grid) for size in (128, 256) for off_grid in (False, True)),
        *(("secagg_plus", size, "auto", "smooth", off_grid) for size in (64, 256) for off_grid in (False, True)),
        *(("plain", 256, count, "smooth", False) for count in (1, 2, 3, 4)),
        *(("plain", 256, 3, pattern, False) for pattern in ("random", "dct")),
        ("plain", 256, 1, "even", False),
    ]
    for name, data in sets(options.data):
        for channel, size, queries, pattern, off_grid in cases:
            setting, grid = f"{queries}, {pattern}", "resized and augmented" if off_grid else "8 bit"
            wanted = key("peeling", name, size, 512, setting, channel, "default", grid)
            if size not in options.images or wanted in options.have:
                continue
            rounds: list[Round] = []
            for seed in range(DIVISIONS):
                split = division(data, seed)
                if off_grid:
                    split = replace(
                        split,
                        clients=augmented(split.clients, seed, 0),
                        server=augmented(split.server, seed, 1),
                    )
                attack = MedLeak(bins=512, queries=queries, patterns=pattern)  # type: ignore[arg-type]
                sent = _sent(attack, split, net(data, "default", seed), CHANNELS[channel], size)
                share = _share(options) if queries == "auto" else -(-_share(options) // 3)
                for _, one in _played(sent, split, (channel,), size, share):
                    rounds += one
            yield _row("peeling", name, rounds, size, 512, setting, body="default", channel=channel, grid=grid)


def _sent(attack: MedLeak, split: Division, model: GlobalModel, channel: Channel, size: int) -> Broadcast:
    view = ServerView(
        model=model,
        recipe=_recipe(size),
        update="weights",
        channel=channel,
        examples=size,
        threat_model="malicious_server",
        can=attack.needs(),
        knowledge=Knowledge(auxiliary=Auxiliary(split.server.images, split.server.targets)),
    )
    return attack.prepare(view, generator("prepare", split.seed))


def _played(
    sent: Broadcast, split: Division, channels: Sequence[str], size: int, batches: int
) -> Iterator[tuple[str, list[Round]]]:
    """The same client steps behind each of the channels."""
    held, draws, recipe = split.clients, generator("round", split.seed, size), _recipe(size)
    bins = QueryBins(sent.secret["rows"], sent.secret["edges"])
    found: dict[str, list[Round]] = {channel: [] for channel in channels}
    for _ in range(batches):
        places = torch.randperm(len(held), generator=draws)[:size]
        batch = Batch(held.images[places], held.targets[places])
        step, _ = client_step(sent.model(0), batch, recipe, generator=draws)
        own = Update("weights", {key: step.trainable[key] for key in (WEIGHT, BIAS)}, {}, {}, size)
        near = pairwise_mse(batch.images, split.server.images).amin(dim=1) < RECOVERED
        for channel in channels:
            seen = CHANNELS[channel]
            models = sent.models if seen.client_count > 1 else sent.models[:1]
            others = [_unchanged(models[-1], size)] * (seen.client_count - 1)
            arrived = seen.send([own, *others], draws)
            broadcast = Broadcast(models, sent.secret, sent.notes)
            observation = Observation(
                models[0], arrived, recipe, "malicious_server", clients=seen.client_count, broadcast=broadcast
            )
            gradient = ModuleGradient(observation, alone=True)
            # The floor was calibrated on a mean over the last channel's clients.
            floor = float(sent.secret["floor"]) * CHANNELS[channels[-1]].client_count / seen.client_count
            candidates = read_module(gradient, bins, models[0].image_shape, size, floor)
            errors = _errors(batch.images, candidates.images.clamp(0, 1))
            found[channel].append(Round(errors < RECOVERED, -10 * errors.log10(), bins.alone(batch.images), near))
    yield from found.items()


def _errors(private: Tensor, images: Tensor) -> Tensor:
    """Mean squared error of each private image with its candidate, infinite without one; as many as can be above 30 dB."""
    errors = torch.full((len(private),), torch.inf, dtype=torch.float64)
    if len(images):
        pairs = pairwise_mse(private.double(), images.double())
        rows, columns = assignment(pairs.clamp_max(RECOVERED))
        errors[rows] = pairs[rows, columns].clamp_min(1e-15)
    return errors


def _unchanged(model: GlobalModel, size: int) -> Update:
    return Update("weights", {key: model.parameters[key] for key in (WEIGHT, BIAS)}, {}, {}, size)


def _recipe(size: int) -> Recipe:
    return Recipe(update="weights", learning_rate=0.1, batch_size=size)


def _share(options: argparse.Namespace) -> int:
    return -(-int(options.batches) // DIVISIONS)


def _row(part: str, data: str, rounds: Sequence[Round], size: int, units: int, setting: str, **other: str) -> Row:
    came, alone = torch.cat([one.came for one in rounds]), torch.cat([one.alone for one in rounds])
    places = torch.arange(len(rounds)).repeat_interleave(torch.tensor([len(one.came) for one in rounds]))
    found = success_rate(came.numpy(), places.numpy(), seed=0)
    psnr, near = torch.cat([one.psnr for one in rounds]), torch.cat([one.near for one in rounds])
    return Row(
        part=part,
        data=data,
        images=size,
        units=units,
        setting=setting,
        batches=len(rounds),
        closed_form=(1 - 1 / units) ** (size - 1),
        alone=float(alone.double().mean()),
        came_back=found.mean or 0.0,
        low=found.low or 0.0,
        high=found.high or 0.0,
        of_alone=float(came[alone].double().mean()),
        least_psnr=float(psnr[came].quantile(0.05)) if len(psnr) and bool(came.any()) else 0.0,
        null=float(near.double().mean()) if len(near) else 0.0,
        **other,
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=("bins", "closed", "peeling"), default=["bins", "closed", "peeling"]
    )
    parser.add_argument("--data", nargs="+", choices=tuple(FILES), default=list(FILES))
    parser.add_argument(
        "--bodies", nargs="+", choices=("uniform", "default"), default=["uniform", "default"], help="in closed"
    )
    parser.add_argument("--images", type=int, nargs="+", default=[16, 64, 128, 256], help="private images of a client")
    parser.add_argument("--units", type=int, nargs="+", default=[512, 1024], help="in the parts bins and closed")
    parser.add_argument(
        "--batches",
        type=int,
        default=30,
        help="rounds per row, in two divisions of the data; a third where queries are given",
    )
    parser.add_argument(
        "--phantoms", action=argparse.BooleanOptionalAction, default=True, help="in bins, drawn films too"
    )
    parser.add_argument("--missing", action="store_true", help="measure only what is not in the table yet")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

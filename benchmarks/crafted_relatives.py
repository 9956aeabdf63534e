"""MedLeak and its relatives on the same rounds: what comes back, and what can come back at most.

    python benchmarks/crafted_relatives.py --data pneumonia skin --images 16 64 --rounds 5 --csv relatives.csv
    python benchmarks/crafted_relatives.py --rounds 0 --csv relatives.csv --page relatives.md

Every attack meets the same nets, private images and auxiliary images, and clients of one float32 SGD step that send
weights (or what `--update`, `--optimizer`, `--rate` and `--steps` say). One row per round; rounds that the CSV holds are not
played again. `read` is the share of the images that the attack is after which come back above 30 dB, one candidate each, with
a 95% interval over rounds. `at most` is the share that can be read in closed form, counted from the truth (for scoring
only), `closed form` its expectation (with several local steps, of LOKI: images that are the first in their bin);
`attributed` is the share of what came back that is attributed to the client that holds it. `nearest auxiliary` is the
share of images that have an auxiliary image above 30 dB: what an attacker has who sees no update.

A new attack is one more `Case` in `crafted_cases.py`.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from crafted_cases import CASES, Case, first_in_their_bin
from crafted_table import Row, table
from tables import put, read_rows, write_rows
from torch import Tensor

from medpfl.attacks.crafted import ServerView
from medpfl.core.domain import Auxiliary, Batch, Broadcast, Knowledge, Observation, Recipe, Reconstruction
from medpfl.core.functional import assignment
from medpfl.core.seeding import generator
from medpfl.data import Dataset, MedMnistReader, PhantomReader, load_dataset
from medpfl.federation import Channel, Plain, SecAggPlus, SecureSum, run_round
from medpfl.metrics.scoring import pairwise_mse

RECOVERED = 1e-3
"""Mean squared error of 30 dB."""

FILES: dict[str, tuple[str, int, Literal[1, 3]]] = {
    "pneumonia": ("pneumoniamnist_subset.npz", 28, 1),
    "skin": ("isic2017_28.npz", 28, 3),
    "bodyparts": ("mednist_64_subset.npz", 32, 1),
}
"""Real images by file, size and channels; two, two and six classes."""

CHANNELS = ("plain", "secure_sum", "secagg_plus")


def main(arguments: Sequence[str] | None = None) -> None:
    """Plays what the CSV does not hold yet, and writes the table into a page."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    rows, started = read_rows(options.csv, Row), time.monotonic()
    done = {(*row.setting, row.seed) for row in rows}
    for seed, data, channel, case, recipe in _wanted(options):
        clients = _channel(channel, options.clients)
        setting = {
            "data": data,
            "channel": channel,
            "clients": clients.client_count,
            "images": recipe.private_images,
            "steps": recipe.local_steps,
            "update": recipe.update,
            "client": f"{options.optimizer} {recipe.learning_rate:g}",
            "units": options.units,
            "attack": case.label,
        }
        if (*setting.values(), seed) in done:
            continue
        if time.monotonic() - started > 60 * options.minutes:
            break
        played = _play(case, dataset(data), recipe, clients, options.units, seed)
        rows.append(Row(**setting, seed=seed, **played))  # type: ignore[arg-type]
        write_rows(options.csv, rows)
        print(rows[-1], flush=True)
    if options.page:
        put(options.page, "table", table(rows, options.attacks))


def _wanted(options: argparse.Namespace) -> Iterator[tuple[int, str, str, Case, Recipe]]:
    """All rounds that were asked for, one seed after the other."""
    recipe = Recipe(
        update=options.update,
        optimizer=options.optimizer,
        learning_rate=options.rate,
        local_steps=options.steps,
    )
    for seed in range(options.rounds):
        for data in options.data:
            for channel in options.channels:
                for images in options.images:
                    for case in CASES:
                        wanted = any(re.search(one, case.label) for one in options.attacks or [""])
                        if wanted and channel in case.channels and data in (case.data or options.data):
                            yield seed, data, channel, case, replace(recipe, batch_size=images // options.steps)


def _play(
    case: Case, data: Dataset, recipe: Recipe, channel: Channel, units: int, seed: int
) -> dict[str, int | float | None]:
    """The round of this seed: private images, net and auxiliary images are the same for every attack."""
    started, images = time.process_time(), recipe.private_images
    order = torch.randperm(len(data), generator=generator("division", seed))
    held = torch.split(order[: images * channel.client_count], images)
    owned = order[images * channel.client_count :]
    clients = [Batch(data.images[part], data.targets[part]) for part in held]
    attack, stream = case.attack(units), generator("attack", seed)
    view = ServerView(
        model=case.net(data, units, seed),
        recipe=recipe,
        update=recipe.update,
        channel=channel,
        examples=images,
        threat_model="malicious_server",
        can=attack.needs(),
        knowledge=Knowledge(auxiliary=Auxiliary(data.images[owned], data.targets[owned])),
    )
    broadcast = attack.prepare(view, stream)
    draws = generator("round", seed)
    update = run_round(broadcast, [(one, draws) for one in clients], recipe, channel=channel, generator=draws)
    seen = Observation(
        broadcast.model(0), update, recipe, "malicious_server", clients=len(clients), broadcast=broadcast
    )
    (result,) = attack.reconstruct([seen], [stream])
    if not isinstance(result, Reconstruction):
        raise SystemExit(f"{case.label} failed: {result.reason}")
    seconds = time.process_time() - started
    private = clients[0].images if case.after == "victim" else torch.cat([one.images for one in clients])
    errors = torch.full((len(private),), torch.inf, dtype=torch.float64)
    owners = torch.arange(len(private)) // images
    said = torch.full((len(private),), -1)
    if len(result.images):
        pairs = pairwise_mse(private.double(), result.images.double())
        rows, columns = assignment(pairs)
        errors[rows] = pairs[rows, columns].double()
        if result.clients is not None:
            said[rows] = result.clients[columns]
    read, most = errors < RECOVERED, _at_most(case, broadcast, private, recipe.local_steps)
    psnr = -10 * errors[read].clamp_min(1e-10).log10()
    return {
        "sought": len(private),
        "read": int(read.sum()),
        "at_most": None if most is None else int(most.sum()),
        "attributed": None if result.clients is None else int((said == owners)[read].sum()),
        "psnr": round(float(psnr.median()), 1) if len(psnr) else None,
        "candidates": len(result.images),
        "near": int((_nearest(private, data.images[owned]) < RECOVERED).sum()),
        "seconds": round(seconds, 2),
    }


def _at_most(case: Case, broadcast: Broadcast, private: Tensor, steps: int) -> Tensor | None:
    """Which images can be read at most; over several local steps this is known of attacks on clients apart only."""
    if steps > 1:
        return first_in_their_bin(broadcast, private, steps) if case.apart else None
    return None if case.at_most is None else case.at_most(broadcast, private)


def _nearest(private: Tensor, auxiliary: Tensor) -> Tensor:
    """Mean squared error of each private image's nearest auxiliary image."""
    return torch.stack([pairwise_mse(image[None], auxiliary).amin() for image in private])


def photographs(count: int) -> Dataset:
    """Color images, 32x32, with the spectrum, mean and contrast of photographs: amplitudes fall as one over frequency."""
    draws = generator("photographs")
    frequency = (torch.fft.fftfreq(32)[:, None].square() + torch.fft.rfftfreq(32)[None].square()).sqrt()
    frequency[0, 0] = 1 / 32
    common = torch.randn(count, 1, 32, 17, generator=draws, dtype=torch.cfloat)
    own = torch.randn(count, 3, 32, 17, generator=draws, dtype=torch.cfloat)
    images = torch.fft.irfft2((common + 0.4 * own) / frequency, s=(32, 32))
    images = (images / images.std() * 0.25 + 0.47).clamp(0, 1)
    like = dataset("skin")
    return replace(like, name="photographs", images=images, targets=torch.arange(count) % like.task.classes)


@cache
def dataset(name: str) -> Dataset:
    """Images by name, loaded once."""
    if name == "films":
        return load_dataset(PhantomReader(kind="chest", count=3000, resolution=28), name=name, size=28, channels=1)
    if name == "photographs":
        return photographs(2000)
    file, size, channels = FILES[name]
    reader = MedMnistReader(path=Path(os.environ["MEDPFL_DATA"], "medmnist", file))
    return load_dataset(reader, name=name, size=size, channels=channels)


def _channel(name: str, clients: int) -> Channel:
    kinds: dict[str, Any] = {"secure_sum": SecureSum, "secagg_plus": SecAggPlus}
    channel: Channel = kinds[name](clients=clients) if name in kinds else Plain()
    return channel


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["pneumonia", "skin"], choices=[*FILES, "films", "photographs"])
    parser.add_argument("--channels", nargs="+", default=["plain", "secure_sum"], choices=CHANNELS)
    parser.add_argument("--clients", type=int, default=4, help="behind secure_sum and secagg_plus")
    parser.add_argument("--images", nargs="+", type=int, default=[16, 64], help="of each client")
    parser.add_argument("--steps", type=int, default=1, help="local steps that a client's images are divided into")
    parser.add_argument("--update", default="weights", choices=["gradient", "weights"], help="what clients send")
    parser.add_argument("--optimizer", default="sgd", choices=["sgd", "adam", "adamw"], help="of clients")
    parser.add_argument("--rate", type=float, default=0.1, help="the clients' learning rate")
    parser.add_argument("--units", type=int, default=512, help="bins or units of the crafted layer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--attacks", nargs="*", default=[], help="only cases in whose label one of these patterns is found"
    )
    parser.add_argument("--minutes", type=float, default=7.0, help="no new round is begun after so long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, metavar="FILE", required=True, help="rows, read and added to")
    parser.add_argument("--page", type=Path, help="page whose table of `--attacks` is written anew")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

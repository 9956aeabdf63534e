"""MedLeak and its relatives on the same rounds: what comes back, and what can come back at most.

    python benchmarks/crafted_relatives.py --data pneumonia skin --images 16 64 --rounds 5 --csv relatives.csv

Every attack meets the same nets, private images and auxiliary images, and clients of one float32 SGD step that send
weights (or gradients: `--update`). `read` is the share of the images that the attack is after which come back above 30 dB, one candidate each, with a 95%
interval over rounds. `at most` is the share that can be read in closed form, counted from the truth (for scoring only),
`closed form` its expectation (with several local steps, of LOKI: images that are the first in their bin); `attributed`
is the share of what came back that is attributed to the client that holds it. `nearest auxiliary` is the share of
images that have an auxiliary image above 30 dB: what an attacker has who sees no update.

A new attack is one more `Case` in `crafted_cases.py`.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from crafted_cases import CASES, Case, first_in_their_bin, first_in_their_bin_expected
from torch import Tensor

from medpfl.attacks.crafted import ServerView
from medpfl.core.domain import Auxiliary, Batch, Broadcast, Knowledge, Observation, Recipe, Reconstruction
from medpfl.core.functional import assignment
from medpfl.core.seeding import generator
from medpfl.data import Dataset, MedMnistReader, PhantomReader, load_dataset
from medpfl.federation import Channel, Plain, SecAggPlus, SecureSum, run_round
from medpfl.metrics.scoring import pairwise_mse
from medpfl.metrics.statistics import success_rate

RECOVERED = 1e-3
"""Mean squared error of 30 dB."""

FILES: dict[str, tuple[str, int, Literal[1, 3]]] = {
    "pneumonia": ("pneumoniamnist_subset.npz", 28, 1),
    "skin": ("isic2017_28.npz", 28, 3),
    "bodyparts": ("mednist_64_subset.npz", 32, 1),
}
"""Real images by file, size and channels; two, two and six classes."""

COLUMNS = (
    "data", "channel", "clients", "images", "steps", "update", "attack", "rounds", "after", "read", "low", "high", "psnr",
    "at_most", "closed_form", "attributed", "candidates", "nearest_auxiliary", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Played:
    """One round: which images the attack is after came back, which can at most, PSNR of the pairs, candidates, seconds.

    attributed: of those that came back, which the attack attributes to the client that holds them; None if to none.
    """

    read: Tensor
    at_most: Tensor | None
    psnr: Tensor
    attributed: Tensor | None
    candidates: int
    near_auxiliary: Tensor
    seconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table row by row as it is measured, and writes it as CSV."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    rows: list[dict[str, str]] = []
    for row in _rows(options):
        rows.append(row)
        print(f"| {' | '.join(row[column] for column in COLUMNS)} |", flush=True)
        if options.csv:
            _write(Path(options.csv), rows)


def _write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def _rows(options: argparse.Namespace) -> Iterator[dict[str, str]]:
    for name in options.data:
        data = dataset(name)
        for channel_name in options.channels:
            channel = _channel(channel_name, options.clients)
            for images in options.images:
                for case in CASES:
                    wanted = any(part in case.label for part in options.attacks) if options.attacks else True
                    if channel_name not in case.channels or name not in (case.data or options.data) or not wanted:
                        continue
                    recipe = Recipe(
                        update=options.update,
                        learning_rate=options.rate,
                        batch_size=images // options.steps,
                        local_steps=options.steps,
                    )
                    played = [_play(case, data, recipe, channel, options.units, seed) for seed in range(options.rounds)]
                    row = _row(case, played, images, channel, options.units, options.steps)
                    yield {"data": name, "channel": channel_name, "update": options.update, **row}


def _play(case: Case, data: Dataset, recipe: Recipe, channel: Channel, units: int, seed: int) -> Played:
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
    return Played(
        read=errors < RECOVERED,
        at_most=_at_most(case, broadcast, private, recipe.local_steps),
        psnr=-10 * errors[errors < RECOVERED].clamp_min(1e-10).log10(),
        attributed=None if result.clients is None else (said == owners)[errors < RECOVERED],
        candidates=len(result.images),
        near_auxiliary=_nearest(private, data.images[owned]) < RECOVERED,
        seconds=seconds,
    )


def _at_most(case: Case, broadcast: Broadcast, private: Tensor, steps: int) -> Tensor | None:
    """Which images can be read at most; over several local steps this is known of attacks on clients apart only."""
    if steps > 1:
        return first_in_their_bin(broadcast, private, steps) if case.apart else None
    return None if case.at_most is None else case.at_most(broadcast, private)


def _closed_form(case: Case, images: int, sought: int, units: int, steps: int) -> float | None:
    if steps > 1:
        return first_in_their_bin_expected(images, units, steps) if case.apart else None
    return None if case.closed_form is None else case.closed_form(images if case.apart else sought, units)


def _nearest(private: Tensor, auxiliary: Tensor) -> Tensor:
    """Mean squared error of each private image's nearest auxiliary image."""
    return torch.stack([pairwise_mse(image[None], auxiliary).amin() for image in private])


def _row(case: Case, played: Sequence[Played], images: int, channel: Channel, units: int, steps: int) -> dict[str, str]:
    reads = torch.cat([one.read for one in played])
    rounds = torch.cat([torch.full((len(one.read),), place) for place, one in enumerate(played)])
    found = success_rate(reads.numpy(), rounds.numpy(), seed=0)
    sought = len(played[0].read)
    most = [one.at_most for one in played if one.at_most is not None]
    told = [one.attributed for one in played if one.attributed is not None]
    values = {
        "clients": channel.client_count,
        "images": images,
        "steps": steps,
        "attack": case.label,
        "rounds": len(played),
        "after": case.after,
        "read": found.mean,
        "low": found.low,
        "high": found.high,
        "psnr": torch.cat([one.psnr for one in played]).median() if bool(reads.any()) else None,
        "at_most": torch.cat(most).double().mean() if most else None,
        "closed_form": _closed_form(case, images, sought, units, steps),
        "attributed": torch.cat(told).double().mean() if told else None,
        "candidates": sum(one.candidates for one in played) / len(played),
        "nearest_auxiliary": torch.cat([one.near_auxiliary for one in played]).double().mean(),
        "seconds": sum(one.seconds for one in played) / len(played),
    }
    return {name: _text(name, value) for name, value in values.items()}


def _text(name: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, (int, str)):
        return str(value)
    number = float(value)  # type: ignore[arg-type]
    return f"{number:.1f}" if name in {"psnr", "candidates", "seconds"} else f"{number:.3f}"


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


def dataset(name: str) -> Dataset:
    if name == "films":
        return load_dataset(PhantomReader(kind="chest", count=3000, resolution=28), name=name, size=28, channels=1)
    if name == "photographs":
        return photographs(2000)
    file, size, channels = FILES[name]
    reader = MedMnistReader(path=Path(os.environ["MEDPFL_DATA"], "medmnist", file))
    return load_dataset(reader, name=name, size=size, channels=channels)


def _channel(name: str, clients: int) -> Channel:
    return {"plain": Plain(), "secure_sum": SecureSum(clients=clients), "secagg_plus": SecAggPlus(clients=clients)}[
        name
    ]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", nargs="+", default=["pneumonia", "skin"], choices=[*FILES, "films", "photographs"])
    parser.add_argument(
        "--channels", nargs="+", default=["plain", "secure_sum"], choices=["plain", "secure_sum", "secagg_plus"]
    )
    parser.add_argument("--clients", type=int, default=4, help="behind secure_sum and secagg_plus")
    parser.add_argument("--images", nargs="+", type=int, default=[16, 64], help="of each client")
    parser.add_argument("--steps", type=int, default=1, help="local steps that a client's images are divided into")
    parser.add_argument("--update", default="weights", choices=["gradient", "weights"], help="what clients send")
    parser.add_argument("--rate", type=float, default=0.1, help="the clients' learning rate")
    parser.add_argument("--units", type=int, default=512, help="bins or units of the crafted layer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attacks", nargs="*", default=[], help="only cases whose label holds one of these words")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", metavar="FILE", help="where to write the table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

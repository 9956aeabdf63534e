"""How often matching with L-BFGS brings images back, and what it costs: one row per data set, net and attack.

    python benchmarks/lbfgs_quality.py --data brain_mri covid_cxr melanoma --models lenet_dlg lenet_idlg \\
        --attacks idlg cpl --seeds 3 --victims 16

Victims hold one image each and send its plain gradient without a defense. Every seed draws another net and other
victims (images of one seed are distinct). Victims of one seed are attacked together; seconds are wall time and process
time over all of them, divided by their number. Nothing of the truth reaches the attack; PSNR is of the clamped image.
`--set name=value` changes settings of every attack, `--preset` picks one of its presets.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from medpfl.attacks import ATTACKS
from medpfl.attacks.base import Attack
from medpfl.core.domain import Batch, Observation, Recipe, Reconstruction
from medpfl.core.seeding import generator
from medpfl.core.tasks import SingleLabel
from medpfl.data import Dataset, load_dataset
from medpfl.data.readers.folder import FolderReader
from medpfl.federation.client import client_step
from medpfl.metrics.statistics import success_rate
from medpfl.models import build_model

CHANNELS = {"brain_mri": 1, "covid_cxr": 1, "melanoma": 3}
SUCCESS = 35.0
"""Decibels above which an image counts as come back."""

HEADER = "| data | net | attack | victims | share above 35 dB [95 %] | median PSNR | right labels | s per victim | process s | evaluations |"


@dataclass(frozen=True)
class Outcome:
    """What became of one victim. matched: objective as a share of the update's squared norm."""

    psnr: float
    right_label: bool
    matched: float
    evaluations: int
    stop_reason: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, row by row as it is measured."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    settings = dict(yaml.safe_load(f"{{{one.replace('=', ': ', 1)}}}").popitem() for one in options.set)
    print(f"threads {options.threads}, settings {options.preset or 'default'} {settings or ''}\n")
    print(HEADER)
    print("|" + " --- |" * (HEADER.count("|") - 1), flush=True)
    for data in options.data:
        channels: Any = options.channels or CHANNELS.get(data, 1)
        reader = FolderReader(path=options.root / data)
        dataset = load_dataset(reader, name=data, size=options.size, channels=channels, aspect="squash")
        for model in options.models:
            for name in options.attacks:
                kind: Any = ATTACKS[name].item
                attack: Attack = kind(**{**(kind.presets[options.preset] if options.preset else {}), **settings})
                outcomes: list[Outcome] = []
                wall, process = time.perf_counter(), time.process_time()
                for seed in range(options.first_seed, options.first_seed + options.seeds):
                    outcomes += _attacked(attack, dataset, model, seed, options.victims)
                wall, process = time.perf_counter() - wall, time.process_time() - process
                print(_row(data, model, name, outcomes, wall, process), flush=True)
                if options.verbose:
                    for one in outcomes:
                        print("  ", one, file=sys.stderr)


def _attacked(attack: Attack, dataset: Dataset, model_name: str, seed: int, victims: int) -> list[Outcome]:
    """One net, `victims` victims, attacked together."""
    shape, task = tuple(dataset.images.shape[1:]), SingleLabel(len(dataset.class_names))
    model = build_model(model_name, image_shape=shape, task=task, generator=generator("net", seed, model_name))
    order = torch.randperm(len(dataset.images), generator=generator("victims", seed, dataset.name))[:victims].tolist()
    recipe = Recipe()
    observations = []
    for index in order:
        update, _ = client_step(model, Batch(dataset.images[[index]], dataset.targets[[index]]), recipe)
        observations.append(Observation(model, update, recipe, "honest_server"))
    results = attack.reconstruct(observations, [generator("attack", seed, index) for index in order])
    outcomes = []
    for index, observation, result in zip(order, observations, results, strict=True):
        if not isinstance(result, Reconstruction) or not len(result.images):
            outcomes.append(Outcome(0.0, False, float("inf"), 0, str(result)))
            continue
        error = float((result.images[0].double() - dataset.images[index].double()).square().mean())
        square = sum(float(one.double().square().sum()) for one in observation.update.trainable.values())
        right = result.labels is not None and int(result.labels[0]) == int(dataset.targets[index])
        psnr = float(-10.0 * torch.tensor(max(error, 1e-10)).log10())
        outcomes.append(
            Outcome(psnr, right, result.objective / square, result.gradient_evaluations, result.stop_reason)
        )
    return outcomes


def _row(data: str, model: str, attack: str, outcomes: Sequence[Outcome], wall: float, process: float) -> str:
    count = len(outcomes)
    share = success_rate([one.psnr > SUCCESS for one in outcomes], range(count), seed=0)
    low, high = (float("nan") if bound is None else bound for bound in (share.low, share.high))
    median = sorted(one.psnr for one in outcomes)[count // 2]
    labels = sum(one.right_label for one in outcomes) / count
    evaluations = sum(one.evaluations for one in outcomes) / count
    return (
        f"| {data} | {model} | {attack} | {count} | {share.mean:.2f} [{low:.2f}, {high:.2f}] | {median:.1f} | "
        f"{labels:.2f} | {wall / count:.2f} | {process / count:.2f} | {evaluations:.0f} |"
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    default = os.environ.get("MEDPFL_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(default), help="folder of the data sets (MEDPFL_DATA)")
    parser.add_argument("--data", nargs="+", default=list(CHANNELS), help="sub-folders of the root, one per data set")
    parser.add_argument("--models", nargs="+", default=["lenet_dlg", "lenet_idlg"])
    parser.add_argument("--attacks", nargs="+", default=["idlg", "cpl"])
    parser.add_argument("--seeds", type=int, default=3, help="nets")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--victims", type=int, default=16, help="per net")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, help="default: 3 for melanoma, else 1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--preset")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="attack settings")
    parser.add_argument("--verbose", action="store_true", help="one line per victim on standard error")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

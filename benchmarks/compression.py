"""Compression, fewer tensors and CENSOR at several strengths: a published attack beside one that knows the defense.

    python benchmarks/compression.py --victims 8 --csv docs/benchmarks/compression.csv --table docs/benchmarks/compression.md

One image per client, one plain gradient on an untrained LeNet of DLG at 32x32. `naive` is iDLG as the audit runs it by
default, `gradinv` the scale-free published attack, `knowing` is iDLG with the likelihood of the known defense, total variation and what
the defense leaves of the output error. The others may spend as many gradient evaluations per victim as the
last one spent on average, its preconditioner's included. Weights of total variation were chosen on other victims. Rows that the CSV file has
already are not measured again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from pictures import KINDS, ROOT, load_pictures
from tables import read_texts, write_texts

from medpfl.attacks.ats_decoding import ATSDecoding
from medpfl.attacks.base import Attack
from medpfl.attacks.dlg import DLG
from medpfl.attacks.feature_readout import FeatureReadout
from medpfl.attacks.gradinv import GradInv
from medpfl.attacks.idlg import IDLG
from medpfl.core.domain import Auxiliary, Batch, GlobalModel, Observation
from medpfl.core.functional import psnr, ssim
from medpfl.core.knowledge import Knowledge
from medpfl.core.mechanisms import sent_names
from medpfl.core.recipes import Recipe
from medpfl.core.seeding import generator
from medpfl.core.tasks import SingleLabel
from medpfl.data import Dataset
from medpfl.defenses import (
    ATS,
    Censor,
    Defense,
    Lora,
    LowRankFactors,
    NoDefense,
    Prune,
    Quantize,
    RandomEntries,
    Share,
    Sign,
    TopEntries,
)
from medpfl.federation.client import client_step
from medpfl.federation.traffic import bytes_sent
from medpfl.metrics.nulls import null_baselines
from medpfl.metrics.truth import GroundTruth
from medpfl.models import build_model

SETTINGS: dict[str, Defense] = {
    "none": NoDefense(),
    "quantize 8 bits": Quantize(bits=8),
    "quantize 4 bits": Quantize(bits=4),
    "quantize 2 bits": Quantize(bits=2),
    "top_k 30%": TopEntries(share=0.3),
    "top_k 10%": TopEntries(share=0.1),
    "top_k 1%": TopEntries(share=0.01),
    "sign": Sign(),
    "low_rank 4": LowRankFactors(rank=4),
    "low_rank 2": LowRankFactors(rank=2),
    "low_rank 1": LowRankFactors(rank=1),
    "random_k 50%": RandomEntries(share=0.5),
    "random_k 20%": RandomEntries(share=0.2),
    "random_k 5%": RandomEntries(share=0.05),
    "prune 50": Prune(percentile=50),
    "prune 80": Prune(percentile=80),
    "prune 95": Prune(percentile=95),
    "censor": Censor(),
    "share, convolutions": Share(tensors=("body.*",)),
    "share, first layer frozen": Share(frozen=("body.0.*",)),
    "share, head only": Share(tensors=("fc.*",)),
    "lora 8": Lora(rank=8),
    "lora 4": Lora(rank=4),
    "lora 1": Lora(rank=1),
    "ats": ATS(),
}
TOTAL_VARIATION = {"none": 0.0, "share": 0.0, "quantize": 1e-3, "low_rank": 1e-3, "random_k": 1e-3}
"""Weights for the attacker who knows, by defense, of 1e-3, 1e-2 and 1e-1 the best on three other brain MRI (share and
none hide nothing of what is sent)."""

FREE = 1e-2
"""Weight for all others."""

COLUMNS = ("data", "defense", "attack", "victim", "psnr", "ssim", "evaluations", "bytes", "seconds")
SUCCESS = 0.9

INTRODUCTION = """# Compression beside an attacker who knows it

One image per client, one plain gradient, untrained LeNet of DLG at 32x32 (grey), eight victims per data set. Median PSNR in
dB. Naive iDLG and GradInv as an audit runs them by default; knowing: iDLG with the likelihood of the known compression,
rounded total variation (weight chosen on three other brain MRI out of 1e-3, 1e-2, 1e-1) and the output error that the
compressed last bias leaves. All spend as many gradient evaluations per victim on average, the preconditioner's included.
The gain is that of each victim over the better of both naive attacks (chosen by the truth, in their favor), mean with
95 % interval (Student's t). No learnt prior is used: `maximum_a_posteriori` has one.

    python benchmarks/compression.py --evaluations 160 --table docs/benchmarks/compression.md

A row appears once all three attacks were run; the same command measures what the CSV file beside this page lacks.
`refused`: the attack infers the label from a last layer that is not sent (a gray picture's PSNR in brackets); who knows that
takes DLG, which searches the label too. Of `head only` who knows reads the features out and inverts them. `ats` changes images
and compresses nothing: who knows its policy takes `ats_decoding`, with auxiliary images, the folder's others. Where the knowing
attack is below the null, it failed: that is no sign of protection. Total variation, which it always uses, costs it dearly
where little is hidden (`none`, 8 bits, the first layer frozen).
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the CSV file lacks, then writes the table."""
    options = _options(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = list(read_texts(options.csv))
    for name in options.settings:
        for data in options.data:
            known = {(row["data"], row["defense"], row["attack"]) for row in rows}
            for attack in ("null", "knowing", "naive", "gradinv"):
                if (data, name, attack) in known or (attack == "null" and (data, "none", "null") in known):
                    continue
                knowing = [
                    row for row in rows if (row["data"], row["defense"], row["attack"]) == (data, name, "knowing")
                ]
                budget = round(mean([int(row["evaluations"]) for row in knowing] or [0])) or options.evaluations
                found = _measured(options, data, "none" if attack == "null" else name, attack, budget)
                rows += found
                write_texts(options.csv, COLUMNS, rows)
                values = [float(row["psnr"]) for row in found]
                print(
                    f"{data:10} {name:26} {attack:8} median {median(values):6.2f} dB {found[0]['seconds']} s",
                    flush=True,
                )
    if options.table:
        options.table.write_text(_page(rows, options), encoding="utf-8")


def _measured(options: argparse.Namespace, data: str, name: str, attack: str, budget: int) -> list[dict[str, Any]]:
    dataset, _ = load_pictures(options.root, data, 32, channels=1)
    order = torch.randperm(len(dataset.images), generator=generator("victims", options.seed, data)).tolist()
    victims = order[options.skip : options.skip + options.victims]
    batches = [Batch(dataset.images[[index]], dataset.targets[[index]]) for index in victims]
    if attack == "null":
        rest = [index for index in order if index not in victims]
        return [row | {"data": data, "defense": "none", "attack": "null"} for row in _null(dataset, victims, rest)]
    defense = SETTINGS[name]
    others = [index for index in order if index not in victims]
    owned = Auxiliary(dataset.images[others], dataset.targets[others]) if name == "ats" else None
    told = Knowledge(defense=defense.mechanism(), auxiliary=owned) if attack == "knowing" else Knowledge()
    observations, sizes = _observed(defense, dataset, batches, options.seed, told)
    started = time.process_time()
    weight = options.total_variation
    if weight is None:
        weight = next((value for key, value in TOTAL_VARIATION.items() if name.startswith(key)), FREE)
    tool = _attack(attack, name, budget, weight)
    streams = [generator("attack", options.seed, place) for place in range(len(batches))]
    first = observations[0]
    why = tool.why_not(first.model, first.recipe, "gradient", 1)
    results = [None] * len(batches) if why else tool.reconstruct(observations, streams)
    seconds = round(time.process_time() - started, 1)
    rows = []
    for place, (batch, result) in enumerate(zip(batches, results, strict=True)):
        images = getattr(result, "images", torch.zeros(0))
        guess = images[:1] if len(images) else torch.full_like(batch.images, 0.5)
        spent = getattr(result, "gradient_evaluations", 0)
        rows.append(
            {"data": data, "defense": name, "attack": attack, "victim": place}
            | {"psnr": round(float(psnr(guess, batch.images)), 3), "ssim": round(float(ssim(guess, batch.images)), 4)}
            | {"evaluations": spent, "bytes": sizes[place], "seconds": seconds}
        )
    return rows


def _observed(
    defense: Defense, dataset: Dataset, batches: Sequence[Batch], seed: int, knowledge: Knowledge
) -> tuple[list[Observation], list[int]]:
    """What the server sees of every victim, and how many bytes each sends."""
    model = _model(defense, dataset, seed)
    seen = model.training_only(sent_names(defense.mechanism(), model.parameters))
    observations, sizes = [], []
    for place, batch in enumerate(batches):
        update, _ = client_step(model, batch, Recipe(), hooks=defense, generator=generator("client", seed, place))
        observations.append(Observation(seen, update, Recipe(), "honest_server", knowledge))
        sizes.append(bytes_sent(update, defense.mechanism()))
    return observations, sizes


def _model(defense: Defense, dataset: Dataset, seed: int) -> GlobalModel:
    task = SingleLabel(len(dataset.class_names))
    stream = generator("net", seed, 32)
    model = defense.model(build_model("lenet_dlg", image_shape=(1, 32, 32), task=task, generator=stream))
    return replace(model, parameters={name: tensor.detach() for name, tensor in model.parameters.items()})


def _attack(attack: str, name: str, evaluations: int, total_variation: float) -> Attack:
    """The attack with at most about so many gradient evaluations (for `knowing` besides its preconditioner's)."""
    if attack == "gradinv":
        return GradInv(iterations=evaluations - 1)
    knowing: dict[str, Any] = {"distance": "likelihood", "total_variation": total_variation}
    if attack == "knowing" and "head only" in name:
        return FeatureReadout(iterations=evaluations)
    if attack == "knowing" and name == "ats":
        return ATSDecoding(iterations=round(evaluations / 1.25), restarts=1)
    steps = max(1, round(evaluations / 1.25 / 20))
    kind = DLG if attack == "knowing" and name == "share, convolutions" else IDLG  # no last layer shows the label
    return kind(iterations=steps, restarts=1, patience=10_000, **(knowing if attack == "knowing" else {}))


def _null(dataset: Dataset, victims: Sequence[int], rest: Sequence[int]) -> list[dict[str, Any]]:
    """The best of the null baselines for each victim."""
    truth = GroundTruth(dataset.images[list(victims)], dataset.targets[list(victims)], ("",) * len(victims))
    found = null_baselines(truth, dataset.images[list(rest)], dataset.targets[list(rest)], generator("null", 0))
    rows = []
    for place in range(len(victims)):
        best = max((found[name] for name in ("class_mean", "nearest")), key=lambda one: float(one.psnr[place]))
        rows.append(
            {"victim": place, "psnr": round(float(best.psnr[place]), 3), "ssim": round(float(best.ssim[place]), 4)}
            | {"evaluations": 0, "bytes": 0, "seconds": 0}
        )
    return rows


def _page(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    lines = [
        INTRODUCTION,
        "| data | defense | bytes | naive iDLG | GradInv | knowing | gain (95 %) | SSIM >= 0.9 naive / knowing |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for data in options.data:
        null = [float(row["psnr"]) for row in rows if row["data"] == data and row["attack"] == "null"]
        if null:
            lines.append(
                f"| {data} | best null baseline | | {median(null):.1f} | {median(null):.1f} | {median(null):.1f} | | |"
            )
        for name in SETTINGS:
            cells = {
                attack: [row for row in rows if (row["data"], row["defense"], row["attack"]) == (data, name, attack)]
                for attack in ("naive", "gradinv", "knowing")
            }
            if all(cells.values()):
                lines.append(_line(data, name, cells))
    return "\n".join(lines) + "\n"


def _line(data: str, name: str, cells: dict[str, list[dict[str, Any]]]) -> str:
    values = {attack: [float(row["psnr"]) for row in found] for attack, found in cells.items()}
    hits = {attack: sum(float(row["ssim"]) >= SUCCESS for row in found) for attack, found in cells.items()}
    best = [max(pair) for pair in zip(values["naive"], values["gradinv"], strict=True)]
    gains = [known - other for known, other in zip(values["knowing"], best, strict=True)]
    spread = 2.365 * stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0  # Student's t, 7 degrees of freedom
    count = len(gains)
    sent = mean(float(row["bytes"]) for row in cells["naive"])
    middle = " | ".join(_median(cells[attack]) for attack in ("naive", "gradinv", "knowing"))
    return (
        f"| {data} | {name} | {sent:,.0f} | {middle} | {mean(gains):+.1f} ± {spread:.1f} | "
        f"{hits['naive']}/{count} / {hits['knowing']}/{count} |"
    )


def _median(found: Sequence[dict[str, Any]]) -> str:
    """The median PSNR; an attack that was refused spent nothing, and its victims' grey pictures are in brackets."""
    middle = f"{median(float(row['psnr']) for row in found):.1f}"
    return middle if any(int(row["evaluations"]) for row in found) else f"refused ({middle})"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the data sets")
    parser.add_argument("--data", nargs="+", choices=sorted(KINDS), default=["brain_mri", "covid_cxr"])
    parser.add_argument("--settings", nargs="+", choices=sorted(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--victims", type=int, default=8)
    parser.add_argument("--skip", type=int, default=8, help="victims before these are for tuning")
    parser.add_argument("--evaluations", type=int, default=250, help="gradient evaluations per victim")
    parser.add_argument("--total-variation", type=float, default=None, help="in place of the chosen weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=Path("docs/benchmarks/compression.csv"))
    parser.add_argument("--table", type=Path, default=None)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

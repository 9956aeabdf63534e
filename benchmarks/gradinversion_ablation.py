"""What each term of GradInversion brings, at equal numbers of gradient evaluations.

    python benchmarks/gradinversion_ablation.py --data brain_mri --models small_cnn --iterations 300
    python benchmarks/gradinversion_ablation.py --development --set total_variation=0.03     # other victims, for tuning

Victims hold `--batch` images each and send the plain gradient of one batch (with their buffers where batch norm is in
train mode), without a defense. Every variant runs the same restarts and iterations; terms that a variant lacks have
weight 0. Models are untrained or trained for some epochs on images that no victim holds. `small_cnn` has three
convolutions with batch norm (16, 32, 64 channels) and a dense layer, `small_resnet` one residual block per stage. Victims for tuning (`--development`) are others than those
reported. Nothing of the truth reaches the attack, but in the row that is marked as an oracle. A running table is
written to `--out`.md and .csv after every row.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from medpfl.attacks.gradinversion import GradInversion
from medpfl.core.domain import Batch, GlobalModel, Knowledge, Observation, Recipe, Reconstruction
from medpfl.core.seeding import generator
from medpfl.core.tasks import SingleLabel
from medpfl.data import Dataset, load_dataset
from medpfl.data.readers.folder import FolderReader
from medpfl.federation.client import client_step
from medpfl.federation.training import TrainingConfig, train
from medpfl.metrics.nulls import null_baselines
from medpfl.metrics.scoring import score
from medpfl.metrics.statistics import Interval, bootstrap_mean, paired_difference
from medpfl.metrics.truth import GroundTruth
from medpfl.models import build_model, prepare
from medpfl.models.batch_norm import batch_norm_layers, forward_with_statistics
from medpfl.models.resnet import BasicBlock

CHANNELS = {"brain_mri": 1, "covid_cxr": 1, "melanoma": 3}
MOST_VICTIMS = 4
"""Reported victims; those for tuning come behind them in the same order."""

OFF: dict[str, Any] = {"total_variation": 0.0, "l2": 0.0, "batch_norm_statistics": "none", "group": 0.0}
ALONE = "gradient only"
IMAGE_PRIORS = "+ TV + L2"


@dataclass(frozen=True)
class Variant:
    """Settings that differ from the attack's own, by their names in `OFF`; `against`: the row without the term."""

    keeps: tuple[str, ...]
    settings: dict[str, Any]
    against: str


VARIANTS = {
    ALONE: Variant((), {}, ALONE),
    "+ TV": Variant(("total_variation",), {}, ALONE),
    IMAGE_PRIORS: Variant(("total_variation", "l2"), {}, "+ TV"),
    "+ TV + L2 + BN running": Variant(("total_variation", "l2"), {"batch_norm_statistics": "running"}, IMAGE_PRIORS),
    "+ TV + L2 + BN recovered": Variant(
        ("total_variation", "l2"), {"batch_norm_statistics": "recovered"}, IMAGE_PRIORS
    ),
    "+ TV + L2 + BN given (oracle)": Variant(
        ("total_variation", "l2"), {"batch_norm_statistics": "given"}, IMAGE_PRIORS
    ),
    "+ TV + L2 + group, not registered": Variant(
        ("total_variation", "l2", "group"), {"registration": "none"}, IMAGE_PRIORS
    ),
    "+ TV + L2 + group, registered": Variant(("total_variation", "l2", "group"), {}, IMAGE_PRIORS),
    "everything (BN auto)": Variant(tuple(OFF), {}, IMAGE_PRIORS),
}


@dataclass(frozen=True)
class Row:
    """One row of the table: what was attacked how, and means over images with intervals over victims."""

    data: str
    model: str
    state: str
    batch_norm: str
    variant: str
    statistics: str
    evaluations: int
    images: int
    psnr: float
    psnr_low: float | None
    psnr_high: float | None
    ssim: float
    ssim_low: float | None
    ssim_high: float | None
    against: str
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    seconds_per_victim: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures row by row, and writes all rows so far after each."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    rows = _read(options.out) if options.append else []
    for name in options.data:
        channels: Any = CHANNELS.get(name, 1)
        dataset = load_dataset(
            FolderReader(path=options.root / name), name=name, size=options.size, channels=channels, aspect="squash"
        )
        for model_name in options.models:
            for state in options.states:
                model, trained = _model(model_name, dataset, state, options)
                for mode in options.batch_norm:
                    rows += _condition(dataset, model, state if trained else "untrained", mode, rows, options)


def _condition(
    dataset: Dataset, model: GlobalModel, state: str, mode: Any, before: list[Row], options: argparse.Namespace
) -> list[Row]:
    truths = _victims(dataset, options)
    recipe = Recipe(batch_size=options.batch, batch_norm=mode)
    observations = [_observation(model, truth, recipe) for truth in truths]
    owners = [victim for victim, truth in enumerate(truths) for _ in truth.items]
    rows: list[Row] = []
    psnrs: dict[str, list[float]] = {}

    def row(variant: str, statistics: str, psnr: list[float], ssim: list[float], count: int, seconds: float) -> None:
        psnrs[variant] = psnr
        mean, similarity = (bootstrap_mean(values, owners, seed=0) for values in (psnr, ssim))
        against = VARIANTS[variant].against if variant in VARIANTS else ""
        gain = Interval(None, None, None)
        if against in psnrs and against != variant:
            gain = paired_difference(psnr, psnrs[against], owners, seed=0)
        rows.append(
            Row(
                dataset.name, model.name, state, mode, variant, statistics, count, len(psnr),
                _number(mean), mean.low, mean.high, _number(similarity), similarity.low, similarity.high,
                against if gain.mean is not None else "", gain.mean, gain.low, gain.high, seconds,
            )
        )  # fmt: skip
        print(_line(rows[-1]), file=sys.stderr, flush=True)
        if options.out is not None:
            _write([*before, *rows], options)

    order = _order(dataset)[(MOST_VICTIMS + options.spare) * options.batch :]
    null = order[len(order) // 2 :]
    for kind in ("class_mean", "nearest"):
        found = [
            null_baselines(truth, dataset.images[null], dataset.targets[null], generator("null", victim))[kind]
            for victim, truth in enumerate(truths)
        ]
        row(f"null: {kind}", "", *([float(x) for one in found for x in getattr(one, key)] for key in ("psnr", "ssim")),
            0, 0.0)  # fmt: skip
    for name, variant in VARIANTS.items():
        if options.variants and name not in options.variants:
            continue
        settings = {key: value for key, value in OFF.items() if key not in variant.keeps}
        attack = GradInversion(
            iterations=options.iterations, restarts=options.restarts, **{**options.set, **settings, **variant.settings}
        )
        if attack.why_not(model, recipe, "gradient", options.batch) is not None:
            continue
        knows = attack.requires()
        seen = [one if knows else _ignorant(one) for one in observations]
        started = time.perf_counter()
        results = attack.reconstruct(seen, [generator("attack", victim) for victim in range(len(truths))])
        seconds = (time.perf_counter() - started) / len(truths)
        scores = []
        for truth, result in zip(truths, results, strict=True):
            assert isinstance(result, Reconstruction), result
            scores += score(result, truth, fallback=torch.full(dataset.images.shape[1:], 0.5))
        assert isinstance(results[0], Reconstruction)
        notes = [note for note in results[0].notes if "batch-norm statistics" in note]
        row(name, notes[0] if variant.settings or "batch_norm_statistics" in variant.keeps else "",
            [one.psnr for one in scores], [one.ssim for one in scores], results[0].gradient_evaluations,
            seconds)  # fmt: skip
    return rows


def _order(dataset: Dataset) -> list[int]:
    return torch.randperm(len(dataset.images), generator=generator("victims", dataset.name)).tolist()


def _victims(dataset: Dataset, options: argparse.Namespace) -> list[GroundTruth]:
    order, batch = _order(dataset), options.batch
    first = MOST_VICTIMS if options.development else 0
    count = min(options.victims, options.spare if options.development else MOST_VICTIMS)
    chosen = [order[batch * victim : batch * (victim + 1)] for victim in range(first, first + count)]
    return [
        GroundTruth(dataset.images[one], dataset.targets[one], tuple(dataset.items[index] for index in one))
        for one in chosen
    ]


def _observation(model: GlobalModel, truth: GroundTruth, recipe: Recipe) -> Observation:
    """What an honest server sees, with the statistics that only the oracle row may use."""
    update, _ = client_step(model, Batch(truth.images, truth.labels), recipe)
    with torch.no_grad():
        _, found = forward_with_statistics(model, truth.images, batch_norm_layers(model), batch_norm=recipe.batch_norm)
    exact = {f"{path}.mean": mean for path, (mean, _) in found.items()}
    exact |= {f"{path}.variance": variance for path, (_, variance) in found.items()}
    return Observation(model, update, recipe, "honest_server", Knowledge(batch_norm_statistics=exact))


def _ignorant(observation: Observation) -> Observation:
    return Observation(observation.model, observation.update, observation.recipe, observation.threat_model)


def small_cnn(channels: int, classes: int, size: int) -> nn.Module:
    """Three convolutions with batch norm and ReLU, and a dense layer over all their outputs."""

    def stage(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    side = (size + 3) // 4
    stages = [*stage(channels, 16, 2), *stage(16, 32, 2), *stage(32, 64, 1)]
    return nn.Sequential(*stages, nn.Flatten(), nn.Linear(64 * side**2, classes))


class SmallResNet(nn.Module):
    """One residual block per stage, 16, 32 and 64 channels; one dense layer over the mean of the last features."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(BasicBlock(16, 16, 1), BasicBlock(16, 32, 2), BasicBlock(32, 64, 2))
        self.fc = nn.Linear(64, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, channels, *size) -> (N, classes)."""
        features = self.blocks(torch.relu(self.bn1(self.conv1(images))))
        output: torch.Tensor = self.fc(features.mean(dim=(2, 3)))
        return output


def _model(name: str, dataset: Dataset, state: str, options: argparse.Namespace) -> tuple[GlobalModel, bool]:
    """The model, and whether it was trained."""
    shape, task = tuple(dataset.images.shape[1:]), SingleLabel(len(dataset.class_names))
    if name in ("small_cnn", "small_resnet"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            resnet = name == "small_resnet"
            module = SmallResNet(shape[0], task.classes) if resnet else small_cnn(shape[0], task.classes, shape[1])
        model = prepare(module, name=name, image_shape=shape, task=task)
    else:
        model = build_model(name, image_shape=shape, task=task, generator=generator("net", name))
    epochs = 0 if state == "untrained" else int(state)
    order = _order(dataset)[(MOST_VICTIMS + options.spare) * options.batch :]
    chosen = order[: len(order) // 2]
    if epochs:
        config = TrainingConfig(epochs=epochs, batch_size=16)
        model = train(model, dataset.images[chosen], dataset.targets[chosen], config, generator("training", name))[0]
    return model, bool(epochs)


def _write(rows: Sequence[Row], options: argparse.Namespace) -> None:
    path: Path = options.out
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(
            {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(row).items()}
            for row in rows
        )
    table = [
        "| data | model | trained for | batch norm | terms | PSNR, dB [95 %] | SSIM [95 %] | gain, dB [95 %] | evaluations |"
    ]
    table += ["|" + " --- |" * 9, *map(_line, rows)]
    text = path.with_suffix(".md").read_text(encoding="utf-8") if path.with_suffix(".md").exists() else ""
    head = text.partition("<!-- table -->")[0] or "# What each term of GradInversion brings\n\n"
    path.with_suffix(".md").write_text(f"{head}<!-- table -->\n\n" + "\n".join(table) + "\n", encoding="utf-8")


def _read(path: Path) -> list[Row]:
    """The rows of an earlier run; numbers as numbers, empty cells as None."""
    kinds = {field.name: str(field.type) for field in fields(Row)}

    def value(name: str, text: str) -> Any:
        if not text and "None" in kinds[name]:
            return None
        return int(text) if kinds[name] == "int" else float(text) if kinds[name].startswith("float") else text

    with path.with_suffix(".csv").open(encoding="utf-8") as file:
        return [Row(**{name: value(name, text) for name, text in row.items()}) for row in csv.DictReader(file)]


def _line(row: Row) -> str:
    gain = "" if row.gain is None else f"{_interval(row.gain, row.gain_low, row.gain_high, '+.2f')} over {row.against}"
    state = row.state if row.state == "untrained" else f"{row.state} epochs"
    return (
        f"| {row.data} | {row.model} | {state} | {row.batch_norm} | {row.variant} | "
        f"{_interval(row.psnr, row.psnr_low, row.psnr_high, '.2f')} | "
        f"{_interval(row.ssim, row.ssim_low, row.ssim_high, '.3f')} | {gain} | {row.evaluations or ''} |"
    )


def _interval(mean: float, low: float | None, high: float | None, form: str) -> str:
    return f"{mean:{form}}" if low is None or high is None else f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _number(interval: Interval) -> float:
    assert interval.mean is not None
    return interval.mean


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    default = os.environ.get("MEDPFL_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(default), help="folder of the data sets (MEDPFL_DATA)")
    parser.add_argument("--data", nargs="+", default=["brain_mri"], help="sub-folders of the root, one per data set")
    parser.add_argument(
        "--models", nargs="+", default=["small_cnn"], help="small_cnn, small_resnet or names of the zoo"
    )
    parser.add_argument("--states", nargs="+", default=["untrained", "20"], help="untrained, or epochs of training")
    parser.add_argument("--batch-norm", nargs="+", default=["train", "eval"], help="the clients' batch norm mode")
    parser.add_argument("--victims", type=int, default=MOST_VICTIMS)
    parser.add_argument("--spare", type=int, default=2, help="victims kept for tuning")
    parser.add_argument("--development", action="store_true", help="attack the victims for tuning instead")
    parser.add_argument("--batch", type=int, default=4, help="images per victim")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=150, help="Adam steps of every restart")
    parser.add_argument("--restarts", type=int, default=4)
    parser.add_argument("--variants", nargs="*", default=[], help="names of the only rows to measure")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="attack settings")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--append", action="store_true", help="keep the rows that --out has")
    parser.add_argument("--out", type=Path, help="path of the table, without its ending")
    options = parser.parse_args(arguments)
    options.set = dict(yaml.safe_load(f"{{{one.replace('=', ': ', 1)}}}").popitem() for one in options.set)
    return options


if __name__ == "__main__":
    main()

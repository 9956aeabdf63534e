"""GradInv on ResNet18 beside breaching's `invertinggradients`, at equal gradient evaluations: quality against time.

    .venv-bench/bin/python benchmarks/gradinv_quality.py --sizes 32 --states untrained trained --budgets 50 100 200 400

Both sides attack the same victims (one image each, plain gradient, batch norm in eval mode), the same net, and infer
the label themselves. One iteration of either is one gradient evaluation. Seconds are process time of one thread per
victim. Rows that the CSV file has already are not measured again. `--peer-set` and `--set` change settings of a side. MedPFL's
defaults were chosen on other victims and nets (`--first-seed 100`) among about forty, breaching's weight of total
variation there among two: the tuning budgets are not equal.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from peer import make_peer
from torch import Tensor, nn

from medpfl.attacks.gradinv import GradInv
from medpfl.core.domain import Batch, GlobalModel, Observation, Recipe, Reconstruction
from medpfl.core.functional import psnr, ssim
from medpfl.core.seeding import generator
from medpfl.core.tasks import SingleLabel
from medpfl.data import Dataset, load_dataset
from medpfl.data.readers.folder import FolderReader
from medpfl.federation.client import client_step
from medpfl.federation.training import TrainingConfig, train
from medpfl.metrics.statistics import bootstrap_mean, paired_difference
from medpfl.models import MODELS, prepare

HERE = Path(__file__).resolve().parent
NETWORKS = {32: "resnet18_cifar", 224: "resnet18"}
TRAINING = TrainingConfig(epochs=5, batch_size=8, learning_rate=0.001)
COLUMNS = (
    "size",
    "state",
    "seed",
    "victim",
    "side",
    "settings",
    "iterations",
    "psnr",
    "ssim",
    "right_label",
    "seconds",
)

State = Literal["untrained", "trained"]
Row = dict[str, str]


@dataclass(frozen=True)
class Setting:
    """One net and its victims. net: the plain module, for the peer; model: the same for MedPFL."""

    dataset: Dataset
    net: nn.Module
    model: GlobalModel
    victims: list[int]
    observations: list[Observation]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the CSV file lacks, then writes the table and the figure."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    rows = _read(options.csv)
    for size in options.sizes:
        for state in options.states:
            setting = None
            for budget in options.budgets:
                for side, settings in (("breaching", options.peer_set), ("medpfl", options.set)):
                    key = {"size": size, "state": state, "seed": options.first_seed, "side": side}
                    key |= {"settings": " ".join(settings), "iterations": budget}
                    if side not in options.sides or any(_matches(row, key) for row in rows):
                        continue
                    setting = setting or make_setting(options, size, state)
                    attack = _breaching if side == "breaching" else _medpfl
                    found = [key | one for one in attack(setting, budget, settings, options.first_seed)]
                    rows += [{name: str(value) for name, value in one.items()} for one in found]
                    _write(options.csv, rows)
                    mean = sum(one["psnr"] for one in found) / len(found)
                    print({**key, "mean_psnr": round(mean, 2), "seconds": round(found[0]["seconds"], 1)}, flush=True)
    if options.table:
        options.table.write_text(table(rows, options), encoding="utf-8")
    if options.figure:
        figure(rows, options.figure)


def make_setting(options: argparse.Namespace, size: int, state: State) -> Setting:
    """Net, victims and what they send; a trained net has seen the other images of the data set."""
    seed = options.first_seed
    reader = FolderReader(path=options.root / options.data)
    dataset = load_dataset(reader, name=options.data, size=size, channels=3, aspect="squash")
    shape, classes = (3, size, size), len(dataset.class_names)
    order = torch.randperm(len(dataset.images), generator=generator("victims", seed, options.data)).tolist()
    victims, rest = order[: options.victims], order[options.victims :]
    net = MODELS[NETWORKS[size]].item(shape, classes, generator("net", seed, size)).eval()
    model = prepare(net, name=NETWORKS[size], image_shape=shape, task=SingleLabel(classes))
    if state == "trained":
        model, _ = train(model, dataset.images[rest], dataset.targets[rest], TRAINING, generator("train", seed, size))
        net.load_state_dict({**model.parameters, **model.buffers, **model.counters}, strict=True)
    model = replace(model, parameters={name: tensor.detach() for name, tensor in model.parameters.items()})
    observations = []
    for index in victims:
        update, _ = client_step(model, Batch(dataset.images[[index]], dataset.targets[[index]]), Recipe())
        observations.append(Observation(model, update, Recipe(), "honest_server"))
    return Setting(dataset, net, model, victims, observations)


def _medpfl(setting: Setting, budget: int, settings: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """All victims side by side; the last evaluation is of the last iterate, as many as the peer's iterations in all."""
    attack = GradInv(iterations=budget - 1, **_values(settings))
    start = time.process_time()
    results = attack.reconstruct(setting.observations, [generator("attack", seed, one) for one in setting.victims])
    seconds = (time.process_time() - start) / len(results)
    scores = []
    for place, result in enumerate(results):
        assert isinstance(result, Reconstruction)
        assert result.labels is not None
        assert result.gradient_evaluations <= budget
        scores.append(_score(setting, place, result.images, result.labels, seconds))
    return scores


def _breaching(setting: Setting, budget: int, settings: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """One victim after the other."""
    scores = []
    for place, observation in enumerate(setting.observations):
        gradients = [observation.update.trainable[name] for name, _ in setting.net.named_parameters()]
        peer = make_peer(
            setting.net,
            gradients,
            setting.model.image_shape,
            setting.model.task.classes,
            [f"optim.max_iterations={budget}", *settings],
        )
        torch.manual_seed(seed + place)
        start = time.process_time()
        image, label, _ = peer.reconstruct()
        scores.append(_score(setting, place, image, label, time.process_time() - start))
    mean = sum(one["seconds"] for one in scores) / len(scores)
    return [{**one, "seconds": mean} for one in scores]


def _score(setting: Setting, place: int, image: Tensor, label: Tensor, seconds: float) -> dict[str, Any]:
    index = setting.victims[place]
    truth = setting.dataset.images[[index]].double()
    found = image.double().clamp(0.0, 1.0)
    return {
        "victim": place,
        "psnr": float(psnr(truth, found)[0]),
        "ssim": float(ssim(truth, found)[0]),
        "right_label": int(label[0]) == int(setting.dataset.targets[index]),
        "seconds": seconds,
    }


def table(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """Markdown: one line per size, state and budget, the sides beside each other, with the paired difference."""
    lines = [
        f"# GradInv on ResNet18, beside breaching\n\n{options.data}, {options.victims} victims, one image each, color, "
        "plain gradient, batch norm in eval mode, no defense. `trained`: 5 epochs of Adam on the other images. Intervals "
        "resample victims (95 %). s: process time of one thread per victim.\n",
        "| size | state | evaluations | breaching PSNR | MedPFL PSNR | difference, dB | breaching SSIM | MedPFL SSIM |"
        " breaching s | MedPFL s |",
        "|" + " --- |" * 10,
    ]
    for size in sorted({int(row["size"]) for row in rows}):
        for state in ("untrained", "trained"):
            for budget in sorted({int(row["iterations"]) for row in rows}):
                line = _line(
                    [r for r in rows if (r["size"], r["state"], r["iterations"]) == (str(size), state, str(budget))]
                )
                lines += [f"| {size} | {state} | {budget} | {line} |"] if line else []
    used = sorted({(row["side"], row["settings"]) for row in rows})
    lines += ["", *(f"Settings of {side}: {settings or 'its defaults'}." for side, settings in used), ""]
    return "\n".join(lines)


def _line(rows: Sequence[Row]) -> str | None:
    sides = {side: [row for row in rows if row["side"] == side] for side in ("breaching", "medpfl")}
    if not all(sides.values()):
        return None

    def values(side: str, name: str) -> list[float]:
        return [float(row[name]) for row in sorted(sides[side], key=lambda row: int(row["victim"]))]

    def interval(side: str, name: str, digits: int) -> str:
        found = bootstrap_mean(values(side, name), range(len(sides[side])), seed=0)
        return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"

    gain = paired_difference(values("medpfl", "psnr"), values("breaching", "psnr"), range(len(sides["medpfl"])), seed=0)
    cells = [interval(side, name, digits) for name, digits in (("psnr", 1), ("ssim", 2)) for side in sides]
    cells.insert(2, f"{gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]")
    return " | ".join([*cells, *(f"{values(side, 'seconds')[0]:.0f}" for side in sides)])


def figure(rows: Sequence[Row], path: Path) -> None:
    """Mean PSNR against seconds per victim, one panel per size and state, one line per side."""
    from matplotlib.figure import Figure

    panels = sorted(
        {(int(row["size"]), row["state"]) for row in rows}, key=lambda panel: (panel[0], panel[1][0] == "t")
    )
    drawing = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for axes, (size, state) in zip(drawing.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for side, color, marker in (("breaching", "#b3541e", "s"), ("medpfl", "#1f5fa8", "o")):
            chosen = [r for r in rows if (r["size"], r["state"], r["side"]) == (str(size), state, side)]
            points = []
            for budget in sorted({int(row["iterations"]) for row in chosen}):
                of_budget = [row for row in chosen if row["iterations"] == str(budget)]
                psnrs = [float(row["psnr"]) for row in of_budget]
                points.append((float(of_budget[0]["seconds"]), sum(psnrs) / len(psnrs), budget))
            if points:
                axes.plot([p[0] for p in points], [p[1] for p in points], marker=marker, color=color, label=side)
            for seconds, value, budget in points:
                axes.annotate(str(budget), (seconds, value), textcoords="offset points", xytext=(0, 6), fontsize=7)
        axes.set(title=f"{size}x{size}, {state}", xlabel="seconds per victim (one thread)", ylabel="mean PSNR, dB")
        axes.set_xlim(left=0.0)
        axes.margins(y=0.15)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    drawing.savefig(path, dpi=110)


def _values(settings: Sequence[str]) -> Mapping[str, Any]:
    return dict(yaml.safe_load(f"{{{one.replace('=', ': ', 1)}}}").popitem() for one in settings)


def _matches(row: Row, key: Mapping[str, Any]) -> bool:
    return all(row[name] == str(value) for name, value in key.items())


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    default = os.environ.get("MEDPFL_DATA", str(HERE.parents[1] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(default), help="folder of the data sets (MEDPFL_DATA)")
    parser.add_argument("--data", default="melanoma", help="sub-folder of the root; breaching takes color images only")
    parser.add_argument("--sizes", nargs="+", type=int, choices=sorted(NETWORKS), default=[32])
    parser.add_argument("--states", nargs="+", choices=["untrained", "trained"], default=["untrained", "trained"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[50, 100, 200, 400], help="gradient evaluations")
    parser.add_argument("--sides", nargs="+", choices=["breaching", "medpfl"], default=["breaching", "medpfl"])
    parser.add_argument("--victims", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0, help="of net, victims and starts; 100 was tuned on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of GradInv")
    parser.add_argument("--peer-set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of breaching")
    parser.add_argument("--csv", type=Path, required=True, help="measured rows, kept and added to")
    parser.add_argument("--table", type=Path, help="Markdown table to write")
    parser.add_argument("--figure", type=Path, help="PNG of quality against time to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

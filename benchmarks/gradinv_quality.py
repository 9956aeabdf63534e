"""GradInv on ResNet18 beside breaching's `invertinggradients`, at equal gradient evaluations: quality against time.

    .venv-bench/bin/python benchmarks/gradinv_quality.py --sizes 32 --states untrained trained --budgets 50 100 200 400

Both sides attack the same victims (one image each, plain gradient, batch norm in eval mode), the same net, and infer
the label themselves. One iteration of either is one gradient evaluation. Seconds are process time of one thread per
victim (wall time on a GPU). Rows that the CSV file has already are not measured again. `--peer-set` and `--set` change
settings of a side. Beside both stands the best null baseline: another image of the same data set, or the class mean.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from gradinv_page import NULLS, Row, figure, table
from peer import make_peer
from pictures import KINDS, ROOT, load_pictures
from torch import Tensor, nn

from medpfl.attacks.gradinv import GradInv
from medpfl.core.devices import choose_device, moved
from medpfl.core.domain import Batch, GlobalModel, Observation, Recipe, Reconstruction
from medpfl.core.functional import psnr, ssim
from medpfl.core.seeding import generator
from medpfl.core.tasks import SingleLabel
from medpfl.data import Dataset
from medpfl.federation.client import client_step
from medpfl.federation.training import TrainingConfig, train
from medpfl.metrics.nulls import null_baselines
from medpfl.metrics.truth import GroundTruth
from medpfl.models import MODELS, prepare

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


@dataclass(frozen=True)
class Setting:
    """One net and its victims. net: the plain module, for the peer; model: the same for MedPFL. title: of the data."""

    dataset: Dataset
    title: str
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
            for side, settings, budget in _measurements(options):
                key = {"size": size, "state": state, "seed": options.first_seed, "side": side}
                key |= {"settings": " ".join(settings), "iterations": budget}
                if any(_matches(row, key) for row in rows):
                    continue
                setting = setting or make_setting(options, size, state)
                found = [key | one for one in _measured(side, setting, budget, settings, options.first_seed)]
                rows += [{name: str(value) for name, value in one.items()} for one in found]
                _write(options.csv, rows)
                mean = sum(one["psnr"] for one in found) / len(found)
                print({**key, "mean_psnr": round(mean, 2), "seconds": round(found[0]["seconds"], 1)}, flush=True)
    if options.table:
        title = load_pictures(options.root, options.data, min(options.sizes), channels=3)[1]
        options.table.write_text(table(rows, title, options.victims), encoding="utf-8")
    if options.figure:
        figure(rows, options.figure)


def _measurements(options: argparse.Namespace) -> Iterator[tuple[str, Sequence[str], int]]:
    """Side, its settings and its iterations: the nulls first, then both sides in turns."""
    for null in NULLS:
        yield null, (), 0
    for budget in options.budgets:
        for side, settings in (("breaching", options.peer_set), ("medpfl", options.set)):
            if side in options.sides:
                yield side, settings, budget


def make_setting(options: argparse.Namespace, size: int, state: State) -> Setting:
    """Net, victims and what they send; a trained net has seen the other images of the data set."""
    seed = options.first_seed
    dataset, title = load_pictures(options.root, options.data, size, channels=3)
    device = torch.device(choose_device(options.device))
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
    return Setting(dataset, title, net.to(device), moved(model, device), victims, moved(observations, device))


def _measured(side: str, setting: Setting, budget: int, settings: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Scores of all victims after so many iterations of a side, or of a null baseline."""
    if side in NULLS:
        return _null(side, setting, seed)
    attack = _breaching if side == "breaching" else _medpfl
    return attack(setting, budget, settings, seed)


def _medpfl(setting: Setting, budget: int, settings: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """All victims side by side; the last evaluation is of the last iterate, as many as the peer's iterations in all."""
    attack = GradInv(iterations=budget - 1, **_values(settings))
    clock = _clock(setting)
    start = clock()
    results = attack.reconstruct(setting.observations, [generator("attack", seed, one) for one in setting.victims])
    seconds = (clock() - start) / len(results)
    scores = []
    for place, result in enumerate(results):
        assert isinstance(result, Reconstruction)
        assert result.labels is not None
        assert result.gradient_evaluations <= budget
        scores.append(_score(setting, place, result.images, result.labels, seconds))
    return scores


def _breaching(setting: Setting, budget: int, settings: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """One victim after the other."""
    scores, clock = [], _clock(setting)
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
        start = clock()
        image, label, _ = peer.reconstruct()
        scores.append(_score(setting, place, image, label, clock() - start))
    mean = sum(one["seconds"] for one in scores) / len(scores)
    return [{**one, "seconds": mean} for one in scores]


def _null(name: str, setting: Setting, seed: int) -> list[dict[str, Any]]:
    """What the null baseline `name` makes of every victim."""
    images, targets = setting.dataset.images, setting.dataset.targets
    others = [place for place in range(len(images)) if place not in setting.victims]
    truth = GroundTruth(images[setting.victims], targets[setting.victims], ("",) * len(setting.victims))
    null = null_baselines(truth, images[others], targets[others], generator("noise", seed))[name]
    return [
        {"victim": place, "psnr": float(null.psnr[place]), "ssim": float(null.ssim[place]), "right_label": ""}
        | {"seconds": 0.0}
        for place in range(len(setting.victims))
    ]


def _clock(setting: Setting) -> Callable[[], float]:
    """Process time of the CPU; wall time once the GPU has done its work, where that is used."""
    if setting.model.device.type == "cpu":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize(setting.model.device)
        return time.perf_counter()

    return clock


def _score(setting: Setting, place: int, image: Tensor, label: Tensor, seconds: float) -> dict[str, Any]:
    index = setting.victims[place]
    truth = setting.dataset.images[[index]].double()
    found = image.cpu().double().clamp(0.0, 1.0)
    return {
        "victim": place,
        "psnr": float(psnr(truth, found)[0]),
        "ssim": float(ssim(truth, found)[0]),
        "right_label": int(label[0]) == int(setting.dataset.targets[index]),
        "seconds": seconds,
    }


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
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the data sets (MEDPFL_DATA)")
    parser.add_argument("--data", choices=list(KINDS), default="melanoma", help="read in color, as breaching needs")
    parser.add_argument("--sizes", nargs="+", type=int, choices=sorted(NETWORKS), default=[32])
    parser.add_argument("--states", nargs="+", choices=["untrained", "trained"], default=["untrained", "trained"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[50, 100, 200, 400], help="gradient evaluations")
    parser.add_argument("--sides", nargs="+", choices=["breaching", "medpfl"], default=["breaching", "medpfl"])
    parser.add_argument("--victims", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0, help="of net, victims and starts; 100 was tuned on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda:N")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of GradInv")
    parser.add_argument("--peer-set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of breaching")
    parser.add_argument("--csv", type=Path, required=True, help="measured rows, kept and added to")
    parser.add_argument("--table", type=Path, help="Markdown table to write")
    parser.add_argument("--figure", type=Path, help="PNG of quality against time to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

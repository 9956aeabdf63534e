"""The leakage gate as a detector: honest clients of many models and stages against crafted models of several families.

One line per client and round: what the gate says, for an update that a client really computed. Detection and false
alarms by group with exact intervals at the end. The gate's settings are its defaults.

    python benchmarks/leakage_gate.py --out gate.csv                      # everything, some minutes
    python benchmarks/leakage_gate.py --out gate.csv --kind honest --models lenet_idlg dense_512
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from scipy.stats import binomtest
from torch import nn

from medpfl.attacks import ATTACKS
from medpfl.attacks.crafted import CraftedAttack, ServerView
from medpfl.core.domain import Auxiliary, Batch, GlobalModel, Knowledge, Recipe
from medpfl.core.errors import AttackFailure
from medpfl.data import Dataset, load_dataset
from medpfl.data.readers.phantom import PhantomReader
from medpfl.federation import Plain
from medpfl.federation.client import client_step
from medpfl.federation.guarding import Received, Trained
from medpfl.federation.training import TrainingConfig, train
from medpfl.guards import LeakageGate
from medpfl.models import build_model, prepare

SIDE = 28
IMAGES = 700
POOL = 100
"""The first images are the clients'; the others train models and are auxiliary knowledge."""
SIZES = (1, 2, 4, 8, 16, 32, 64)
STAGES = (0, 20, 200)
"""Steps of training before the round."""

CRAFTED: dict[str, dict[str, object]] = {
    "medleak": {"scale": 1e-4, "queries": 1},
    "medleak-queries": {"scale": 1e-4, "queries": 4},
    "medleak-queries-quiet": {"scale": 1.0, "queries": 4},
    "medleak-published": {"scale": 1.0, "queries": 1, "quantiles": "gaussian", "balance": False},
    "medleak-quiet": {"scale": 1e-2, "queries": 1},
    "medleak-few": {"scale": 1e-4, "bins": 64, "queries": 1},
    "robbing_the_fed": {"scale": 1e-4},
    "robbing_the_fed-sparse": {"scale": 1e-4, "variant": "sparse"},
    "curious_abandon_honesty": {"scale": 1e-4, "factor": 0.97, "tuning": "factor"},
    "loki": {"scale": 1e-4},
    "ares": {"scale": 1e-2},
}
"""Family -> settings that need no rounds on auxiliary images, so that preparing takes no time."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model as a client receives it."""

    kind: str
    family: str
    images: str
    stage: str
    seed: int
    model: GlobalModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV, one line per client and round")
    parser.add_argument("--kind", choices=("honest", "crafted"), help="only this kind")
    parser.add_argument("--models", nargs="*", help="only these models or families")
    parser.add_argument("--images", nargs="*", default=["brain", "chest", "skin"], help="kinds of phantoms")
    parser.add_argument("--seeds", type=int, default=2, help="models and batches of each kind")
    parser.add_argument("--summary", action="store_true", help="only summarize the CSV that is there")
    arguments = parser.parse_args()
    if not arguments.summary:
        with arguments.out.open("w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(["kind", "family", "images", "stage", "seed", "size", "level", "seconds", "reasons"])
            for subject, data, order in subjects(arguments):
                for size in SIZES:
                    writer.writerow(judged(subject, data, order[:size]))
                    handle.flush()
    summarize(arguments.out)


def subjects(arguments: argparse.Namespace) -> Iterator[tuple[Subject, Dataset, torch.Tensor]]:
    """All models that clients receive."""
    for images in arguments.images:
        reader = PhantomReader(count=IMAGES, kind=images)
        data = load_dataset(reader, name=images, size=SIDE, channels=1, aspect="squash")
        for seed in range(arguments.seeds):
            order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(seed))
            if arguments.kind != "crafted":
                for subject in honest(arguments.models, data, order[POOL:], images, seed):
                    yield subject, data, order[:POOL]
            if arguments.kind != "honest":
                for subject in crafted(arguments.models, data, order[POOL:], images, seed):
                    yield subject, data, order[:POOL]


def honest(only: list[str] | None, data: Dataset, pool: torch.Tensor, images: str, seed: int) -> Iterator[Subject]:
    """Models before and during training, and what people do to trained ones."""
    for name in only or [*DENSE, *ZOO]:
        if name not in (*DENSE, *ZOO):
            continue
        model = built(name, data, seed)
        for stage in STAGES:
            config = TrainingConfig(steps=stage)
            trained = model
            if stage:
                stream = torch.Generator().manual_seed(seed)
                trained, _ = train(model, data.images[pool], data.targets[pool], config, stream)
            yield Subject("honest", name, images, str(stage), seed, trained)
        for change, work in CHANGES.items():
            yield Subject("honest", name, images, change, seed, with_weights(trained, work))


def crafted(only: list[str] | None, data: Dataset, pool: torch.Tensor, images: str, seed: int) -> Iterator[Subject]:
    """What servers of several families send in place of a LeNet."""
    for family, settings in CRAFTED.items():
        if only and family not in only:
            continue
        attack_class = ATTACKS[family.partition("-")[0]].item
        attack = attack_class(**settings)
        assert isinstance(attack, CraftedAttack)
        body = "lenet_idlg" if "architecture" in attack.needs() else "cnn_fedavg"
        view = ServerView(
            model=built(body, data, seed),
            recipe=None,
            update="weights",
            channel=Plain(),
            examples=32,
            threat_model="malicious_server",
            can=attack.needs(),
            knowledge=Knowledge(auxiliary=Auxiliary(data.images[pool], data.targets[pool])),
        )
        try:
            model = attack.prepare(view, torch.Generator().manual_seed(seed)).model(0)
        except AttackFailure as failure:
            print(f"{family}: {failure}")
            continue
        yield Subject("crafted", family, images, "0", seed, model)


def judged(subject: Subject, data: Dataset, chosen: torch.Tensor) -> list[object]:
    """A line of the table: one client's round with this model."""
    batch = Batch(data.images[chosen], data.targets[chosen])
    recipe = Recipe(update="weights", learning_rate=0.1, batch_size=len(batch))
    update, _ = client_step(subject.model, batch, recipe)
    started = time.perf_counter()
    verdict = LeakageGate().after(Trained(Received(subject.model, batch, recipe), update, [torch.arange(len(batch))]))
    seconds = time.perf_counter() - started
    named = [subject.kind, subject.family, subject.images, subject.stage, subject.seed, len(batch)]
    return [*named, verdict.level, f"{seconds:.3f}", "; ".join(verdict.reasons)]


def built(name: str, data: Dataset, seed: int) -> GlobalModel:
    """A freshly initialized model."""
    shape, generator = tuple(data.images.shape[1:]), torch.Generator().manual_seed(1000 + seed)
    if name not in DENSE:
        return build_model(name, image_shape=shape, task=data.task, generator=generator)
    widths, last = DENSE[name], data.images[0].numel()
    layers: list[nn.Module] = [nn.Flatten()]
    with torch.random.fork_rng():
        torch.manual_seed(1000 + seed)
        for width in widths:
            layers += [nn.Linear(last, width), nn.ReLU()]
            last = width
        layers.append(nn.Linear(last, data.task.classes))
    return prepare(nn.Sequential(*layers), name=name, image_shape=shape, task=data.task)


DENSE = {"dense_64": [64], "dense_512": [512], "dense_2048": [2048], "dense_512_256": [512, 256]}
ZOO = ["lenet_dlg", "lenet_idlg", "lenet_cpl", "cnn_fedavg", "cnn3", "vit"]


def with_weights(model: GlobalModel, change: Callable[[torch.Tensor], torch.Tensor]) -> GlobalModel:
    """The same model with changed weights, biases as they are."""
    weights = {name: change(tensor) if tensor.ndim > 1 else tensor for name, tensor in model.parameters.items()}
    return dataclasses.replace(model, parameters=weights)


def pruned(weight: torch.Tensor) -> torch.Tensor:
    """Without the smaller half of its entries."""
    return torch.where(weight.abs() >= weight.abs().median(), weight, 0.0)


def quantized(weight: torch.Tensor) -> torch.Tensor:
    """Rounded to 8 bits."""
    step = weight.abs().max() / 127
    return (weight / step).round() * step


CHANGES = {"pruned": pruned, "quantized": quantized}


def summarize(path: Path) -> None:
    """Prints how often each group is called crafted, and how often it is withheld, with exact 95% intervals."""
    with path.open() as handle:
        rows = list(csv.DictReader(handle))
    for kind in ("honest", "crafted"):
        print(f"\n{kind}: called crafted / withheld, of rounds with at least 16 images")
        groups = dict.fromkeys(row["family"] for row in rows if row["kind"] == kind)
        for family in [*groups, "all"]:
            chosen = [
                row
                for row in rows
                if row["kind"] == kind and family in (row["family"], "all") and int(row["size"]) >= 16
            ]
            levels = Counter(row["level"] for row in chosen)
            if chosen:
                stopped = len(chosen) - levels["passed"]
                print(f"  {family:26s} {rate(levels['crafted'], len(chosen))}   {rate(stopped, len(chosen))}")
    slowest = max((float(row["seconds"]) for row in rows), default=0.0)
    print(f"\nslowest look: {slowest:.2f} s")


def rate(count: int, whole: int) -> str:
    """A share with its exact interval."""
    found = binomtest(count, whole).proportion_ci(method="exact")
    return f"{count:4d} of {whole:4d} = {count / whole:.3f} [{found.low:.3f}, {found.high:.3f}]"


if __name__ == "__main__":
    main()

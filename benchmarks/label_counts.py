"""How often the label counts of a client are recovered from its update, and which share of its labels.

    python benchmarks/label_counts.py --victims 4 --out docs/benchmarks

Clients draw their classes half of the time evenly, half of the time from a skewed distribution (Dirichlet 0.5), so that
classes repeat and are missing. A client sends one gradient, or trains in shuffled order: 2 epochs of 4 local steps of
SGD (with and without momentum 0.9) or Adam. Nets are untrained, or trained for 3 epochs on images that no client
holds. Two rules get the same updates: that of MedPFL, and as a reference that of iLRG (2023).
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from medpfl.attacks.label_counts import round_to_sum
from medpfl.attacks.labels import infer_labels
from medpfl.attacks.layers import DenseLayer, last_dense
from medpfl.attacks.updates import gradient_view
from medpfl.core.domain import Batch, GlobalModel, Observation, Recipe
from medpfl.core.seeding import generator
from medpfl.data import Dataset, load_dataset
from medpfl.data.readers.folder import FolderReader
from medpfl.data.readers.medmnist import MedMnistReader
from medpfl.federation.client import client_step
from medpfl.federation.training import TrainingConfig, train
from medpfl.metrics.statistics import success_rate
from medpfl.models import build_model

DATA = {
    "brain_mri": 1,
    "covid_cxr": 1,
    "melanoma": 3,
    "medmnist/mednist_64_subset.npz": 1,
    "medmnist/pneumoniamnist_subset.npz": 1,
    "medmnist/isic2017_28.npz": 3,
}
SIZES = (2, 4, 8, 16, 32)
UPDATES = ("gradient", "sgd", "momentum", "adam")
MOST_IMAGES = 400
"""Images read of one data set."""


@dataclass(frozen=True)
class Row:
    """One client: what it was, and what each rule found."""

    data: str
    model: str
    epochs: int
    batch_norm: str
    update: str
    images: int
    exact: bool
    recall: float
    reference_exact: bool
    reference_recall: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures everything and writes `label_counts.md` and `label_counts.csv`."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    started, rows = time.perf_counter(), _known(options.out / "label_counts.csv") if options.add else []
    for data in options.data:
        dataset = _dataset(options.root, data)
        for model in options.models:
            for epochs in (0, 3):
                rows += list(_measured(dataset, model, epochs, options))
                _write(rows, options.out)
                print(f"{dataset.name} {model} {epochs}: {time.perf_counter() - started:.0f} s", flush=True)


def _write(rows: Sequence[Row], out: Path) -> None:
    with (out / "label_counts.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Row.__dataclass_fields__)
        writer.writerows([getattr(row, name) for name in Row.__dataclass_fields__] for row in rows)
    (out / "label_counts.md").write_text(_page(rows), encoding="utf-8")


def _known(path: Path) -> list[Row]:
    """Rows of an earlier run."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(
                row["data"],
                row["model"],
                int(row["epochs"]),
                row["batch_norm"],
                row["update"],
                int(row["images"]),
                row["exact"] == "True",
                float(row["recall"]),
                row["reference_exact"] == "True",
                float(row["reference_recall"]),
            )
            for row in csv.DictReader(file)
        ]


def _measured(dataset: Dataset, model_name: str, epochs: int, options: argparse.Namespace) -> Iterator[Row]:
    shape, seed = tuple(dataset.images.shape[1:]), options.seed
    order = torch.randperm(len(dataset), generator=generator("halves", dataset.name, seed))
    pool, private = order[: len(dataset) // 2], order[len(dataset) // 2 :]
    model = build_model(
        model_name, image_shape=shape, task=dataset.task, generator=generator("net", seed, model_name, dataset.name)
    )
    if epochs:
        config = TrainingConfig(epochs=epochs, batch_size=16)
        model, _ = train(model, dataset.images[pool], dataset.targets[pool], config, generator("train", seed))
    large = model.parameter_count > options.large
    modes = ("eval", "train") if large else ("eval",)
    for mode in modes:
        for update in UPDATES[:1] if large else UPDATES:
            for images in SIZES:
                if update != "gradient" and images < 4:
                    continue
                recipe = _recipe(update, images, mode)
                for victim in range(max(2, options.victims // 3) if large else options.victims):
                    stream = generator("victim", seed, dataset.name, images, victim)
                    chosen = _client(dataset, private, images, victim % 2 == 1, stream)
                    yield _attacked(dataset, model, epochs, update, recipe, chosen, stream)


def _recipe(update: str, images: int, mode: str) -> Recipe:
    if update == "gradient":
        return Recipe(batch_size=images, batch_norm=mode)  # type: ignore[arg-type]
    return Recipe(
        update="delta",
        batch_size=images // 4,
        local_steps=4,
        epochs=2,
        shuffle=True,
        batch_norm=mode,  # type: ignore[arg-type]
        optimizer="adam" if update == "adam" else "sgd",
        learning_rate=0.001 if update == "adam" else 0.01,
        momentum=0.9 if update == "momentum" else 0.0,
    )


def _client(dataset: Dataset, private: Tensor, images: int, skewed: bool, stream: torch.Generator) -> Tensor:
    """Places of a client's images: classes drawn evenly or from a skewed distribution, each image once if it can be."""
    classes = len(dataset.class_names)
    weights = torch._sample_dirichlet(torch.full((classes,), 0.5 if skewed else 1e6), generator=stream)
    labels = torch.multinomial(weights, images, replacement=True, generator=stream).tolist()
    left = {label: private[dataset.targets[private] == label] for label in range(classes)}
    chosen = []
    for label in set(labels):
        own, wanted = left[label], labels.count(label)
        shuffled = own[torch.randperm(len(own), generator=stream)]
        chosen += shuffled.repeat(-(-wanted // len(own)))[:wanted].tolist()
    places = torch.tensor(chosen)
    return places[torch.randperm(images, generator=stream)]


def _attacked(
    dataset: Dataset,
    model: GlobalModel,
    epochs: int,
    update: str,
    recipe: Recipe,
    chosen: Tensor,
    stream: torch.Generator,
) -> Row:
    batch = Batch(dataset.images[chosen], dataset.targets[chosen])
    sent, _ = client_step(model, batch, recipe, generator=stream)
    observation = Observation(model, sent, recipe, "honest_server")
    classes, labels = len(dataset.class_names), infer_labels(observation).labels
    assert labels is not None
    truth = torch.bincount(batch.targets, minlength=classes)
    counts = torch.bincount(labels, minlength=classes)
    reference = reference_counts(observation)
    return Row(
        dataset.name,
        model.name,
        epochs,
        recipe.batch_norm,
        update,
        len(chosen),
        torch.equal(counts, truth),
        float(torch.minimum(counts, truth).sum()) / len(chosen),
        torch.equal(reference, truth),
        float(torch.minimum(reference, truth).sum()) / len(chosen),
    )


def reference_counts(observation: Observation) -> Tensor:
    """The rule of iLRG: every class' outputs are those of its weight row divided by its bias entry."""
    layer = last_dense(observation.model)
    assert isinstance(layer, DenseLayer)
    assert layer.bias is not None
    gradients, parameters = gradient_view(observation).tensors, observation.model.parameters
    bias, examples = gradients[layer.bias], observation.examples
    features = gradients[layer.weight] / torch.where(bias == 0, 1e-300, bias)[:, None]
    scores = features @ parameters[layer.weight].double().T + parameters[layer.bias].double()
    outputs = torch.softmax(scores, dim=1).nan_to_num(nan=1.0 / len(bias))
    system = torch.cat([outputs.T - torch.eye(len(bias)), torch.ones(1, len(bias), dtype=torch.float64)])
    right = torch.cat([examples * bias, torch.tensor([float(examples)], dtype=torch.float64)])
    return round_to_sum(torch.linalg.lstsq(system, right, driver="gelsd").solution, examples)


def _page(rows: Sequence[Row]) -> str:
    text = [
        "# Label counts of batches",
        "",
        "Measured by `python benchmarks/label_counts.py`. Share of clients whose whole multiset of labels is recovered,"
        " and (after the slash) share of labels, with 95 % intervals of the former over all sizes; in the last column "
        "the same of the reference rule. Data sets together; clients draw classes evenly or skewed, so classes repeat "
        "and are missing.",
        "",
    ]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        trained = f"{row.epochs} epochs" if row.epochs else "untrained"
        groups.setdefault((row.model, trained, row.batch_norm, row.update), []).append(row)
    head = ["net", "state", "batch norm", "update", *map(str, SIZES), "all sizes", "n", "iLRG"]
    text += _table(head, [[*key, *_cells(group)] for key, group in groups.items()])
    nets = {row.model: ", ".join(dict.fromkeys(one.data for one in rows if one.model == row.model)) for row in rows}
    text += ["", "Measured on: " + "; ".join(f"{net} on {data}" for net, data in nets.items()) + "."]
    text += ["", "By data set, single gradients:", ""]
    by_data: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.update == "gradient":
            by_data.setdefault((row.data.partition("/")[2] or row.data,), []).append(row)
    text += _table(
        ["data", *map(str, SIZES), "all sizes", "n", "iLRG"], [[*key, *_cells(own)] for key, own in by_data.items()]
    )
    return "\n".join(text) + "\n"


def _cells(group: Sequence[Row]) -> list[str]:
    cells = []
    for size in SIZES:
        own = [row for row in group if row.images == size]
        cells.append(f"{_mean(row.exact for row in own)} / {_mean(row.recall for row in own)}" if own else "")
    share = success_rate([row.exact for row in group], range(len(group)), seed=0)
    recall = _mean(row.recall for row in group)
    reference = f"{_mean(row.reference_exact for row in group)} / {_mean(row.reference_recall for row in group)}"
    return [*cells, f"{share.mean:.2f} [{share.low:.2f}, {share.high:.2f}] / {recall}", str(len(group)), reference]


def _mean(values: Iterator[float]) -> str:
    found = list(values)
    return f"{sum(found) / len(found):.2f}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def _dataset(root: Path, name: str) -> Dataset:
    path = root / name
    reader = MedMnistReader(path=path) if path.suffix == ".npz" else FolderReader(path=path)
    channels = 3 if DATA.get(name) == 3 else 1
    return load_dataset(reader, name=name, size=32, channels=channels, maximum=MOST_IMAGES)  # type: ignore[arg-type]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    default = os.environ.get("MEDPFL_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(default), help="folder of the data sets (MEDPFL_DATA)")
    parser.add_argument("--data", nargs="+", default=list(DATA), help="folders or npz files below the root")
    parser.add_argument("--models", nargs="+", default=["lenet_idlg", "cnn3", "vit", "resnet18_cifar"])
    parser.add_argument("--victims", type=int, default=4, help="clients per size; a third of it for large nets")
    parser.add_argument("--large", type=int, default=1_000_000, help="parameters above which a net counts as large")
    parser.add_argument("--add", action="store_true", help="add to the rows of an earlier run in the same folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

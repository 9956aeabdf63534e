"""What stolen images are worth: classifiers trained on them, on the originals, and on the server's own images alone.

    python benchmarks/medleak_downstream.py --data pneumoniamnist --seeds 10 --out docs/benchmarks

For every seed the images are divided anew, classes taking turns: `--auxiliary` images are the server's own, `--rounds` x `--batch` images are
what victims hold. MedLeak attacks every round, once in `plain` and once behind `secagg_plus` with four clients (mode
`separate`); all candidates that it returns are the thief's loot, wrong ones included. Then one net per row is trained,
all with the same start, steps and batch size, and judged on the published test split, which nobody holds.

With `--nets` above 1 accuracy and AUC of a row are means over so many nets, each with a start and order of its own:
what the training's own chance adds to differences shrinks, the margin stays.

Labels of the loot: `read` from the update with the image, `guessed` by a classifier that was trained on the server's own
images, or `true` ones of the images that they resemble most (an oracle). Intervals of
accuracy and AUC are 95% t intervals over seeds of their logits, so that they stay within [0, 1].
Equivalence with the originals: two one-sided paired t tests over seeds with the margin `--margin`, fixed beforehand.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import pandas as pd
import torch
from medleak_rounds import (
    DATA,
    Divided,
    Images,
    as_recipe,
    auc,
    balanced_accuracy,
    crafted,
    dataset,
    divided,
    equivalence,
    new_model,
    outputs,
    shuffled_batches,
    spread,
    stolen,
)
from torch import Tensor

from medpfl.attacks.medleak import MedLeak
from medpfl.core.domain import GlobalModel
from medpfl.core.functional import assignment
from medpfl.core.seeding import generator
from medpfl.data import Dataset
from medpfl.federation import Channel, Plain, SecAggPlus
from medpfl.federation.training import TrainingConfig, train
from medpfl.metrics.scoring import pairwise_mse

CHANNELS: Mapping[str, Channel] = {"plain": Plain(), "secagg_plus": SecAggPlus(clients=4)}
ORIGINALS = "originals"
OWN = "server's own"
TASK = ["data", "auxiliary", "nets"]
"""What rows share that are of one task."""

Sets = tuple[Dataset, Dataset | None]


def loot(sets: Sets, held: Divided, channel: Channel, batch: int, seed: int) -> dict[str, Images]:
    """The stolen images of all rounds with each kind of label, and under `originals` the victims' own."""
    recipe, attack, model = as_recipe(batch), MedLeak(), new_model(sets, seed)
    batches = shuffled_batches(held.clients, batch, seed)
    broadcast = crafted(attack, model, held.auxiliary, recipe, channel, seed)
    others = batches[1:] + batches[:1]
    images, read, true = [], [], []
    for number, victim in enumerate(batches):
        clients = [victim, *(others[(number + more) % len(others)] for more in range(channel.client_count - 1))]
        found = stolen(attack, broadcast, clients, recipe, channel, seed * 1000 + number)
        images.append(found.images)
        if found.labels is not None:
            read.append(found.labels)
        rows = pairwise_mse(found.images.float(), victim.images).argmin(dim=1)
        true.append(victim.labels[rows])
    taken = torch.cat(images).float()
    rows = {"true (oracle)": Images(taken, torch.cat(true))}
    if read:
        rows["read"] = Images(taken, torch.cat(read))
    return rows


def recovered(taken: Images, private: Images) -> float:
    """Share of the private images that came back above 30 dB, one to one."""
    errors = pairwise_mse(private.images, taken.images)
    rows, columns = assignment(errors)
    return float((errors[rows, columns] < 1e-3).double().sum() / len(private))


def trained_net(sets: Sets, images: Images, steps: int, seed: int, number: int) -> GlobalModel:
    """A net trained on the images; start and order are the same for all rows of a seed, others for another number."""
    config = TrainingConfig(steps=steps, batch_size=32, learning_rate=0.001)
    stream = generator("training", seed, *[number] * (number > 0))
    return train(new_model(sets, seed, number), images.images, images.labels, config, stream)[0]


def one_seed(sets: Sets, options: argparse.Namespace, seed: int) -> list[dict[str, object]]:
    """All rows of one division."""
    held = divided(sets, options.auxiliary, options.rounds * options.batch, seed)
    found: list[dict[str, object]] = []
    trained: list[tuple[Images, list[Tensor]]] = []

    def scored(images: Images) -> list[Tensor]:
        """Test outputs of every net; equal images with equal labels are trained on once."""
        for known, scores in trained:
            if known.images is images.images and torch.equal(known.labels, images.labels):
                return scores
        nets = [trained_net(sets, images, options.steps, seed, number) for number in range(options.nets)]
        trained.append((images, [outputs(net, held.test.images) for net in nets]))
        return trained[-1][1]

    def add(trained_on: str, labels: str, images: Images, share: float | None, right: float | None) -> None:
        scores = scored(images)
        found.append(
            {
                "seed": seed,
                "trained_on": trained_on,
                "labels": labels,
                "images": len(images),
                "recovered": share,
                "labels_right": right,
                "balanced_accuracy": mean(balanced_accuracy(one, held.test.labels) for one in scores),
                "auc": mean(auc(one, held.test.labels) for one in scores),
            }
        )

    add(ORIGINALS, "true", held.clients, None, None)
    add(OWN, "true", held.auxiliary, None, None)
    own = trained_net(sets, held.auxiliary, options.steps, seed, 0)
    for name, channel in CHANNELS.items():
        rows = loot(sets, held, channel, options.batch, seed)
        true = rows["true (oracle)"]
        rows["guessed"] = Images(true.images, outputs(own, true.images).argmax(dim=1))
        share = recovered(true, held.clients)
        for labels, images in rows.items():
            add(f"stolen, {name}", labels, images, share, float((images.labels == true.labels).float().mean()))
    return found


def table(rows: pd.DataFrame, margin: float) -> list[str]:
    """The rows of the document, means over seeds; tests are paired by seed with the originals."""
    original = rows[rows.trained_on == ORIGINALS].set_index("seed")
    lines = [
        "| trained on | labels | images | recovered | labels right | balanced accuracy [95%] | AUC [95%] | difference of "
        "balanced accuracy [90%], p (TOST) | difference of AUC [90%], p (TOST) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (trained_on, labels), part in rows.groupby(["trained_on", "labels"], sort=False):
        part = part.set_index("seed")
        cells = [str(trained_on), str(labels), f"{part.images.mean():.0f}"]
        cells += [
            "" if part[name].isna().all() else f"{part[name].mean():.3f}" for name in ("recovered", "labels_right")
        ]
        for name in ("balanced_accuracy", "auc"):
            found = spread(part[name].to_numpy(), scale="share")
            cells.append(f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]")
        for name in ("balanced_accuracy", "auc"):
            if trained_on == ORIGINALS:
                cells.append("")
                continue
            differences = (part[name] - original[name]).to_numpy()
            found = spread(differences, 0.9)
            p = equivalence(differences, margin)
            cells.append(
                f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}], {'<0.001' if p < 0.001 else f'{p:.3f}'}"
            )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", choices=DATA, default="phantom")
    found.add_argument("--seeds", type=int, default=6, help="number of divisions")
    found.add_argument("--first-seed", type=int, default=0, help="rows of other seeds in the CSV are kept")
    found.add_argument("--rounds", type=int, default=6, help="attacked rounds, each with another victim's batch")
    found.add_argument("--batch", type=int, default=64, help="images of a victim")
    found.add_argument("--auxiliary", type=int, default=100, help="the server's own images")
    found.add_argument("--steps", type=int, default=250, help="training steps of every classifier, 32 images each")
    found.add_argument("--nets", type=int, default=1, help="nets that every classifier's measures are the mean of")
    found.add_argument("--margin", type=float, default=0.02, help="largest difference that counts as equivalent")
    found.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, adds to the CSV and prints the table."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    sets, path = dataset(options.data), options.out / "medleak_downstream.csv"
    kept: dict[tuple[object, ...], list[dict[str, object]]] = defaultdict(list)
    if path.is_file():
        for row in read(path).to_dict("records"):
            kept[*(row[name] for name in TASK), row["seed"]].append({str(key): value for key, value in row.items()})
    task = {"data": options.data, "auxiliary": options.auxiliary, "nets": options.nets}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        if kept[*task.values(), seed]:
            continue
        started = time.perf_counter()
        kept[*task.values(), seed] = [{**task, **row} for row in one_seed(sets, options, seed)]
        options.out.mkdir(parents=True, exist_ok=True)
        pd.DataFrame([row for key in sorted(kept) for row in kept[key]]).round(6).to_csv(path, index=False)
        print(f"seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    rows = read(path)
    own = (rows.data == options.data) & (rows.auxiliary == options.auxiliary) & (rows.nets == options.nets)
    print("\n".join(table(rows[own], options.margin)))


def read(path: Path) -> pd.DataFrame:
    """All rows that were measured."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


if __name__ == "__main__":
    main()

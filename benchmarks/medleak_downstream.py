"""What stolen images are worth: classifiers trained on them, on the originals, and on the server's own images alone.

    python benchmarks/medleak_downstream.py --data pneumoniamnist --seeds 10 --out docs/benchmarks

For every seed the images are divided anew, classes taking turns: `--auxiliary` images are the server's own, `--rounds` x `--batch` images are
what victims hold. MedLeak attacks every round, once in `plain` and once behind `secagg_plus` with four clients (mode
`separate`); all candidates that it returns are the thief's loot, wrong ones included. Then one net per row is trained,
all with the same start, steps and batch size, and judged on the published test split, which nobody holds.

Labels of the loot: `read` from the update with the image, `guessed` by a classifier that was trained on the server's own
images, or `true` ones of the images that they resemble most (an oracle). Intervals are 95% t intervals over seeds.
Equivalence with the originals: two one-sided paired t tests over seeds with the margin `--margin`, fixed beforehand.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from medleak_rounds import (
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

from medpfl.attacks.medleak import MedLeak
from medpfl.core.functional import assignment
from medpfl.core.seeding import generator
from medpfl.data import Dataset
from medpfl.federation import Channel, Plain, SecAggPlus
from medpfl.federation.training import TrainingConfig, train
from medpfl.metrics.scoring import pairwise_mse

CHANNELS: Mapping[str, Channel] = {"plain": Plain(), "secagg_plus": SecAggPlus(clients=4)}
ORIGINALS = "originals"


def loot(sets: tuple[Dataset, Dataset], held: Divided, channel: Channel, batch: int, seed: int) -> dict[str, Images]:
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


def trained_scores(sets: tuple[Dataset, Dataset], images: Images, test: Images, steps: int, seed: int) -> torch.Tensor:
    """Test outputs of a net trained on the images; start and order of all rows of a seed are the same."""
    config = TrainingConfig(steps=steps, batch_size=32, learning_rate=0.001)
    model, _ = train(new_model(sets, seed), images.images, images.labels, config, generator("training", seed))
    return outputs(model, test.images)


def one_seed(sets: tuple[Dataset, Dataset], options: argparse.Namespace, seed: int) -> list[dict[str, object]]:
    """All rows of one division."""
    held = divided(sets, options.auxiliary, options.rounds * options.batch, seed)
    own = train(
        new_model(sets, seed),
        held.auxiliary.images,
        held.auxiliary.labels,
        TrainingConfig(steps=options.steps, batch_size=32, learning_rate=0.001),
        generator("training", seed),
    )[0]
    found: list[dict[str, object]] = []
    trained: list[tuple[Images, torch.Tensor]] = []

    def scored(images: Images) -> torch.Tensor:
        """Test outputs; equal images with equal labels are trained on once."""
        for known, scores in trained:
            if known.images is images.images and torch.equal(known.labels, images.labels):
                return scores
        trained.append((images, trained_scores(sets, images, held.test, options.steps, seed)))
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
                "balanced_accuracy": balanced_accuracy(scores, held.test.labels),
                "auc": auc(scores, held.test.labels),
            }
        )

    add(ORIGINALS, "true", held.clients, None, None)
    add("server's own", "true", held.auxiliary, None, None)
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
            found = spread(part[name].to_numpy())
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
    found.add_argument("--data", choices=["pneumoniamnist", "phantom"], default="phantom")
    found.add_argument("--seeds", type=int, default=6, help="number of divisions")
    found.add_argument("--first-seed", type=int, default=0, help="rows of other seeds in the CSV are kept")
    found.add_argument("--rounds", type=int, default=6, help="attacked rounds, each with another victim's batch")
    found.add_argument("--batch", type=int, default=64, help="images of a victim")
    found.add_argument("--auxiliary", type=int, default=100, help="the server's own images")
    found.add_argument("--steps", type=int, default=250, help="training steps of every classifier, 32 images each")
    found.add_argument("--margin", type=float, default=0.02, help="largest difference that counts as equivalent")
    found.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, adds to the CSV and prints the table."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    sets, path = dataset(options.data), options.out / "medleak_downstream.csv"
    kept: dict[tuple[str, int], list[dict[str, object]]] = defaultdict(list)
    if path.is_file():
        for row in pd.read_csv(path, keep_default_na=False, na_values=[""]).to_dict("records"):
            kept[row["data"], row["seed"]].append({str(key): value for key, value in row.items()})
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        started = time.perf_counter()
        kept[options.data, seed] = [{"data": options.data, **row} for row in one_seed(sets, options, seed)]
        frame = pd.DataFrame([row for key in sorted(kept) for row in kept[key]])
        options.out.mkdir(parents=True, exist_ok=True)
        frame.round(6).to_csv(path, index=False)
        print(f"seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    print("\n".join(table(frame[frame.data == options.data], options.margin)))


if __name__ == "__main__":
    main()

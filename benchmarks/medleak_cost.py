"""What the attacked round costs the clients' own task, and whether anybody could notice.

    python benchmarks/medleak_cost.py --data pneumoniamnist --seeds 5 --out docs/benchmarks

Eight clients of 64 images train one net together, one SGD step a round, all weights averaged. They start from a net that
was trained on their images for 0, 30 or 300 steps before. After one honest round they meet a second honest one, or one
that MedLeak's server attacks (`separate`: the victim gets the module and all others a dead one; `joint`: all get the
module). Rows are what one client can see with its own images: loss and balanced accuracy of the model that it received
and of its own model after its step, and the length of its update against the median of the second honest round.
`noticed` is the share of clients whose received loss is above that of every client in the first honest round. `next
model` is judged on the test split: what the server can send on after the round, with the averaged body or with the model of
before.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

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
    new_model,
    outputs,
    shuffled_batches,
    spread,
)

from medpfl.attacks.front import BODY, SECOND_WEIGHT, WEIGHT
from medpfl.attacks.medleak import MedLeak
from medpfl.core.domain import Broadcast, GlobalModel, Recipe, Update
from medpfl.core.seeding import generator
from medpfl.data import Dataset
from medpfl.federation import SecureSum
from medpfl.federation.client import client_step
from medpfl.federation.training import TrainingConfig, train
from medpfl.metrics.statistics import success_rate

CLIENTS, BATCH = 8, 64
CHANNEL = SecureSum(clients=CLIENTS)
SHARES = ("accuracy_received", "accuracy_after", "auc")
"""Measures between 0 and 1."""


def federated(broadcast: Broadcast, clients: Sequence[Images], recipe: Recipe) -> tuple[list[Update], Update]:
    """What every client sends, and the mean."""
    sent = [client_step(broadcast.model(number), one.batch, recipe)[0] for number, one in enumerate(clients)]
    return sent, CHANNEL.send(iter(sent), torch.Generator())


def averaged(model: GlobalModel, mean: Update, prefix: str = "") -> GlobalModel:
    """`model` with the averaged tensors of the same names behind the prefix."""
    found = {name: mean.trainable[f"{prefix}{name}"].float() for name in model.parameters}
    return replace(model, parameters=found)


def length(model: GlobalModel, update: Update) -> float:
    """Norm of the change of all weights."""
    squares = [(tensor.double() - model.parameters[name]).square().sum() for name, tensor in update.trainable.items()]
    return float(torch.stack(squares).sum().sqrt())


def seen(model: GlobalModel, update: Update, own: Images) -> dict[str, float]:
    """What a client can measure with its own images."""
    after = replace(model, parameters=update.trainable)
    found = {"length": length(model, update)}
    for when, one in (("received", model), ("after", after)):
        scores = outputs(one, own.images)
        found[f"loss_{when}"] = float(one.task.loss(scores, own.labels))
        found[f"accuracy_{when}"] = balanced_accuracy(scores, own.labels)
    return found


def one_seed(
    sets: tuple[Dataset, Dataset | None], stages: Sequence[int], auxiliary: int, seed: int
) -> list[dict[str, object]]:
    """All rows of one federation."""
    held = divided(sets, auxiliary, CLIENTS * BATCH, seed)
    clients, recipe = shuffled_batches(held.clients, BATCH, seed), as_recipe(BATCH)
    rows: list[dict[str, object]] = []
    for steps in stages:
        config = TrainingConfig(steps=steps, batch_size=32, learning_rate=0.001)
        stream = generator("training", seed)
        first, _ = train(new_model(sets, seed), held.clients.images, held.clients.labels, config, stream)
        sent, mean = federated(Broadcast((first,)), clients, recipe)
        known = max(seen(first, *pair)["loss_received"] for pair in zip(sent, clients, strict=True))
        model = averaged(first, mean)
        sent, mean = federated(Broadcast((model,)), clients, recipe)
        honest = [seen(model, *pair) for pair in zip(sent, clients, strict=True)]
        usual = sorted(one["length"] for one in honest)[CLIENTS // 2]
        rounds = {"honest": (honest, {"averaged": averaged(model, mean)})}
        rounds |= attacked(model, clients, held, recipe, seed)
        for kind, (measured, nexts) in rounds.items():
            about = {"seed": seed, "steps_before": steps, "round": kind}
            for place, one in enumerate(measured):
                role = "all" if kind != "separate" else "others" if place else "victim"
                noticed = float(one["loss_received"] > known)
                rows.append({**about, "client": role, **one, "length": one["length"] / usual, "noticed": noticed})
            for name, after in nexts.items():
                scores = outputs(after, held.test.images)
                accuracy, area = balanced_accuracy(scores, held.test.labels), auc(scores, held.test.labels)
                rows.append({**about, "client": f"next model, {name}", "accuracy_after": accuracy, "auc": area})
    return rows


def attacked(
    model: GlobalModel,
    clients: Sequence[Images],
    held: Divided,
    recipe: Recipe,
    seed: int,
) -> dict[str, tuple[list[dict[str, float]], dict[str, GlobalModel]]]:
    """What clients see of attacked rounds, and the models that the server can send next."""
    found = {}
    attack = MedLeak()
    for mode in ("separate", "joint"):
        broadcast = crafted(attack, model, held.auxiliary, recipe, CHANNEL, seed)
        attack = as_calibrated(broadcast, "joint")
        sent, mean = federated(broadcast, clients, recipe)
        measured = [
            seen(broadcast.model(number), update, own)
            for number, (update, own) in enumerate(zip(sent, clients, strict=True))
        ]
        found[mode] = (measured, {"averaged body": averaged(model, mean, f"{BODY}."), "of before": model})
    return found


def as_calibrated(broadcast: Broadcast, mode: Literal["separate", "joint"]) -> MedLeak:
    """The attack with the settings that it found for this broadcast, for another mode: calibrating anew takes long."""
    sent, rows = broadcast.model(0).parameters, broadcast.secret["rows"]
    scale = float(sent[WEIGHT][0].double() @ rows[0] / rows[0].square().sum())
    gain = float(sent[SECOND_WEIGHT][:, 0].double().norm()) * scale * sent[WEIGHT].shape[0]
    return MedLeak(mode=mode, scale=scale, gain=gain, queries=len(rows))


def table(rows: pd.DataFrame) -> list[str]:
    """The rows of the document: means over clients, then over seeds with 95% intervals.

    Intervals of accuracy and AUC are t intervals of logits, those of losses and lengths of logarithms, mapped back; those
    of `noticed` are of `success_rate`, over seeds.
    """

    def told(part: pd.DataFrame, name: str) -> str:
        if name not in part or part[name].isna().all():
            return ""
        if name == "noticed":
            share = success_rate(part[name].to_numpy() > 0, part.seed.to_numpy(), seed=0)
            return f"{share.mean:.2f} [{share.low:.2f}, {share.high:.2f}]"
        values = part.groupby("seed")[name].mean().dropna().to_numpy()
        found = spread(values, scale="share" if name in SHARES else "size")
        digits = 1 if name == "length" else 2
        return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"

    columns = ("loss_received", "accuracy_received", "loss_after", "accuracy_after", "auc", "length", "noticed")
    lines = [
        "| trained before, steps | round | client | loss received | balanced accuracy received | loss after its step | balanced accuracy "
        "after | AUC | length of the update, honest = 1 | noticed |",
        f"|{' --- |' * 10}",
    ]
    for key, part in rows.groupby(["steps_before", "round", "client"], sort=False):
        told_columns = [told(part, name) for name in columns]
        lines.append(f"| {' | '.join([f'{key[0]:.0f}', *map(str, key[1:]), *told_columns])} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes the CSV and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="phantom")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, help="rows of other seeds in the CSV are kept")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 30, 300], help="training before")
    parser.add_argument("--auxiliary", type=int, default=200, help="the server's own images")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sets, path = dataset(options.data), options.out / "medleak_cost.csv"
    frame = pd.read_csv(path) if path.is_file() else pd.DataFrame({"seed": []})
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        new = pd.DataFrame(one_seed(sets, options.steps, options.auxiliary, seed))
        frame = pd.concat([frame[frame.seed != seed], new])
        frame.round(6).to_csv(path, index=False)
    print("\n".join(table(frame)))


if __name__ == "__main__":
    main()

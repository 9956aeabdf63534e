"""What `medpfl replay --diagnose` reads of updates to which a known thing was done, and what it says where nothing was.

    MEDPFL_DATA=../shared/data python benchmarks/recorded_facts.py --clients 2 --out docs/benchmarks

Clients with real brain MRIs send new weights (or changes, where they quantize or drop entries) after one step on four
images or two epochs of two steps, to an untrained net and to one after two epochs of training on images of nobody. One thing
is done to what they send, and the facts are read as a server reads them. The second table states a wrong recipe, or none,
and counts how often the right one is found on the true images.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tables import has_texts, read_texts, write_texts
from torch import Tensor

from medpfl.audit.replay import prepare_replay
from medpfl.audit.replay.diagnosis.changes import Owned
from medpfl.audit.replay.diagnosis.facts import measured
from medpfl.audit.replay.diagnosis.subject import Fact
from medpfl.audit.replay.diagnosis.subjects import owned_update, subject_of
from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.seeding import generator
from medpfl.core.tasks import Task
from medpfl.data import FolderReader, load_dataset
from medpfl.federation.client import client_step
from medpfl.federation.recording import MemoryStorage, Recorder, read_recording
from medpfl.federation.training import TrainingConfig, train
from medpfl.models import build_model

NETS = ("lenet_idlg", "cnn3")
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "one step": {"batch_size": 4, "learning_rate": 0.05},
    "4 steps": {"batch_size": 2, "local_steps": 2, "epochs": 2, "learning_rate": 0.05},
}
IMAGES = 4
FACTS = ("noise", "grid", "precision", "zeros", "bound", "equal_steps", "rank")
"""What stands in the way, or is there at all."""


@dataclass(frozen=True)
class Owner:
    """All images in a mixed order, with their labels."""

    images: Tensor
    targets: Tensor
    task: Task


Change = dict[str, Tensor]
Done = Callable[[Change, torch.Generator], Change]


def _noised(deviation: float, laplace: bool = False) -> Done:
    def add(change: Change, stream: torch.Generator) -> Change:
        def draw(tensor: Tensor) -> Tensor:
            if not laplace:
                return deviation * torch.randn(tensor.shape, generator=stream)
            uniform = torch.rand(tensor.shape, generator=stream, dtype=torch.float64) - 0.5
            return (-deviation / 2**0.5 * uniform.sign() * torch.log1p(-2 * uniform.abs())).float()

        return {name: tensor + draw(tensor) for name, tensor in change.items()}

    return add


def _quantized(bits: int) -> Done:
    def quantize(change: Change, stream: torch.Generator) -> Change:
        found = {}
        for name, tensor in change.items():
            step = 2 * float(tensor.abs().max()) / (2**bits - 1)
            found[name] = torch.floor(tensor / step + torch.rand(tensor.shape, generator=stream)) * step
        return found

    return quantize


def _clipped(change: Change, _: torch.Generator) -> Change:
    norm = torch.cat([tensor.flatten() for tensor in change.values()]).norm()
    return {name: tensor * float(min(1.0, 0.02 / norm)) for name, tensor in change.items()}


def _top(share: float) -> Done:
    def drop(change: Change, _: torch.Generator) -> Change:
        values = torch.cat([tensor.flatten().abs() for tensor in change.values()])
        least = values.sort().values[-max(1, int(share * len(values)))]
        return {name: tensor * (tensor.abs() >= least) for name, tensor in change.items()}

    return drop


def _signs(change: Change, _: torch.Generator) -> Change:
    return {name: 1e-3 * tensor.sign() for name, tensor in change.items()}


def _nothing(change: Change, _: torch.Generator) -> Change:
    return change


DONE: Mapping[str, tuple[Done, str, float | None]] = {
    "nothing": (_nothing, "weights", None),
    "normal noise 1e-5": (_noised(1e-5), "weights", 1e-5),
    "normal noise 1e-4": (_noised(1e-4), "weights", 1e-4),
    "normal noise 1e-3": (_noised(1e-3), "weights", 1e-3),
    "normal noise 1e-2": (_noised(1e-2), "weights", 1e-2),
    "Laplace noise 1e-3": (_noised(1e-3, laplace=True), "weights", 1e-3),
    "clipped to 0.02": (_clipped, "weights", None),
    "8 bits, stochastic": (_quantized(8), "delta", None),
    "4 bits, stochastic": (_quantized(4), "delta", None),
    "2 bits, stochastic": (_quantized(2), "delta", None),
    "largest 10%": (_top(0.1), "delta", None),
    "signs": (_signs, "delta", None),
    "bfloat16 weights": (_nothing, "bfloat16", None),
    "float16 weights": (_nothing, "float16", None),
}
"""What is done, in which form it is sent, and the deviation of the noise."""

WRONG: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any] | None]] = {
    "nothing wrong": ({"epochs": 2}, {"epochs": 2}),
    "no recipe given": ({"epochs": 1}, None),
    "no recipe given, 2 epochs of 2 steps": ({"epochs": 2, "batch_size": 2, "local_steps": 2}, None),
    "epochs": ({"epochs": 3}, {"epochs": 1}),
    "batch size": ({"batch_size": 2, "local_steps": 2}, {}),
    "learning rate": ({"epochs": 3, "learning_rate": 0.02}, {"epochs": 3}),
    "optimizer": ({"optimizer": "adam", "learning_rate": 0.001}, {}),
    "epochs and batch size": ({"epochs": 3, "batch_size": 2, "local_steps": 2}, {}),
    "momentum 0.9": ({"epochs": 3, "momentum": 0.9}, {"epochs": 3}),
}
"""The client's recipe, and the one that is stated, beyond batch size 4 and learning rate 0.05."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes `recorded_facts.csv` and `recorded_facts.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=2, help="clients for each net, state and recipe")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder of the table and its page")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    path = Path(os.environ.get("MEDPFL_DATA", "../shared/data")) / "brain_mri"
    data = load_dataset(FolderReader(path=path), name="brain_mri", size=32, channels=1)
    order = torch.randperm(len(data), generator=generator("facts order"))
    owned = Owner(data.images[order], data.targets[order], data.task)
    told, recipes = options.out / "recorded_facts.csv", options.out / "recorded_facts_recipes.csv"
    read, found = read_texts(told), read_texts(recipes)
    for name in NETS:
        for state, model in _states(name, owned, options.clients):
            for recipe in RECIPES:
                for done in DONE:
                    if not has_texts(told, {"net": name, "state": state, "recipe": recipe, "done": done}):
                        read.append(_read(model, state, recipe, done, owned, options.clients))
            write_texts(told, list(read[0]), read)
            for wrong in WRONG:
                if not has_texts(recipes, {"net": name, "state": state, "wrong": wrong}):
                    found.append(_found(model, state, wrong, owned, options.clients))
            write_texts(recipes, list(found[0]), found)
    (options.out / "recorded_facts.md").write_text(_page(read, found, options.clients), encoding="utf-8")


def _states(name: str, data: Owner, clients: int) -> Iterator[tuple[str, GlobalModel]]:
    model = build_model(
        name, image_shape=tuple(data.images.shape[1:]), task=data.task, generator=generator("facts", name)
    )
    yield "untrained", model
    rest = slice(IMAGES * clients, IMAGES * clients + 1024)
    config, stream = TrainingConfig(epochs=2), generator("facts training", name)
    yield "2 epochs", train(model, data.images[rest], data.targets[rest], config, stream)[0]


def _batch(data: Owner, client: int) -> Batch:
    places = slice(client * IMAGES, (client + 1) * IMAGES)
    return Batch(data.images[places], data.targets[places])


def _read(model: GlobalModel, state: str, recipe: str, done: str, data: Owner, clients: int) -> dict[str, str]:
    act, form, deviation = DONE[done]
    storage = MemoryStorage()
    with Recorder(storage) as recorder:
        recorder.sent(1, {**model.parameters, **model.buffers, **model.counters})
        for client in range(clients):
            update, _ = client_step(model, _batch(data, client), Recipe(update="delta", **RECIPES[recipe]))
            change = act(dict(update.trainable), generator("facts done", done, client))
            sent = change if form == "delta" else {name: model.parameters[name] + one for name, one in change.items()}
            if form in ("bfloat16", "float16"):
                sent = {name: one.to(getattr(torch, form)).float() for name, one in sent.items()}
            kind: Any = "delta" if form == "delta" else "weights"
            recorder.received(1, f"{client:03d}", sent, kind=kind, examples=IMAGES)
    settings = prepare_replay(
        "facts", read_recording(storage), model.name, recipe=dict(RECIPES[recipe]), size=32, channels=1,
        classes=model.task.classes,
    )  # fmt: skip
    facts = [measured(subject_of(settings, update)) for update in settings.updates]
    ratios = [
        fact.value / deviation for one in facts for fact in one if deviation and fact.name == "noise" and fact.value
    ]
    return {
        "net": model.name, "state": state, "recipe": recipe, "done": done, "updates": str(clients),
        **{name: str(sum(_tells(one, name) for one in facts)) for name in FACTS},
        "noise_ratio": f"{median(ratios):.3f}" if ratios else "",
        "noise_ratio_low": f"{min(ratios):.3f}" if ratios else "",
        "noise_ratio_high": f"{max(ratios):.3f}" if ratios else "",
    }  # fmt: skip


def _tells(facts: Sequence[Fact], name: str) -> bool:
    """Whether something was found; of noise, that it is there at all."""
    if name == "noise":
        return any(fact.name == name and "something was added" in fact.text for fact in facts)
    return any(fact.name == name for fact in facts if name != "zeros" or fact.standing == "hinders")


def _found(model: GlobalModel, state: str, wrong: str, data: Owner, clients: int) -> dict[str, str]:
    real, stated = WRONG[wrong]
    base = {"batch_size": IMAGES, "learning_rate": 0.05}
    right = Recipe(update="weights", **{**base, **real})
    explained = exact = replayed = 0
    with TemporaryDirectory() as folder:
        storage = MemoryStorage()
        with Recorder(storage) as recorder:
            recorder.sent(1, {**model.parameters, **model.buffers, **model.counters})
            for client in range(clients):
                batch = _batch(data, client)
                update, _ = client_step(model, batch, right)
                recorder.received(1, f"{client:03d}", update.trainable, kind="weights", examples=IMAGES)
                np.savez(Path(folder) / f"{client:03d}.npz", images=batch.images.numpy(), labels=batch.targets.numpy())
        settings = prepare_replay(
            "facts", read_recording(storage), model.name, recipe=None if stated is None else {**base, **stated},
            truth=Path(folder), size=32, channels=1, classes=model.task.classes,
        )  # fmt: skip
        for update in settings.updates:
            owned = owned_update(settings, update, subject_of(settings, update))
            if not isinstance(owned, Owned) or isinstance(owned.agreement, str):
                continue
            found = owned.agreement
            replayed += int(found.agrees and not found.found)
            explained += int(found.found)
            exact += int(found.found and _same(found.recipe, right))
    return {"net": model.name, "state": state, "wrong": wrong, "updates": str(clients), "as_stated": str(replayed),
            "another_explains": str(explained), "the_clients_own": str(exact)}  # fmt: skip


def _same(one: Recipe, other: Recipe) -> bool:
    names = ("batch_size", "local_steps", "epochs", "optimizer")
    rates = one.learning_rate / other.learning_rate
    return all(getattr(one, name) == getattr(other, name) for name in names) and 0.97 < rates < 1.03


def _page(read: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], clients: int) -> str:
    lines = [
        "# What a diagnosis reads of recorded updates", "",
        f"Measured by `python benchmarks/recorded_facts.py --clients {clients}` ([rows](recorded_facts.csv)). "
        f"{' and '.join(NETS)}, untrained and after two epochs, four images a client, one step and four steps: "
        f"{clients * len(NETS) * 2 * len(RECIPES)} updates a line. How many of them were told to have what stands above the "
        "column; the last column is measured noise over true noise (median, range).", "",
        f"| done to the update | {' | '.join(FACTS)} | measured / true noise |",
        f"|---|{'---:|' * (len(FACTS) + 1)}",
    ]  # fmt: skip
    for done in DONE:
        rows = [row for row in read if row["done"] == done]
        total = sum(int(row["updates"]) for row in rows)
        counts = " | ".join(f"{sum(int(row[name]) for row in rows)} of {total}" for name in FACTS)
        ratios = [row for row in rows if row["noise_ratio"]]
        spread = (
            f"{median(float(row['noise_ratio']) for row in ratios):.2f} "
            f"({min(float(row['noise_ratio_low']) for row in ratios):.2f} to "
            f"{max(float(row['noise_ratio_high']) for row in ratios):.2f})"
            if ratios
            else ""
        )
        lines.append(f"| {done} | {counts} | {spread} |")
    lines += [
        "", "`zeros` counts updates of which half or more did not change; `rank` that a dense layer changed in more directions "
        "than the stated images can move it.", "",
        "With the truth: how often the stated recipe gives the update to rounding, how often another recipe that was found "
        f"explains it (1% of its squared norm), and how often that is the client's own ({clients * len(NETS) * 2} updates a "
        "line, [rows](recorded_facts_recipes.csv)).", "",
        "| wrong in the recipe | as stated | another explains it | it is the client's own |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    for wrong in WRONG:
        rows = [row for row in found if row["wrong"] == wrong]
        total = sum(int(row["updates"]) for row in rows)
        counts = (sum(int(row[name]) for row in rows) for name in ("as_stated", "another_explains", "the_clients_own"))
        lines.append(f"| {wrong} | {' | '.join(f'{count} of {total}' for count in counts)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""What the Flower recorder and mods add to a round, beside the same round without them. Needs `medpfl[flower]`.

    python benchmarks/integration_overhead.py --page docs/benchmarks/integration_overhead.md

A round is what one would see if every client had a machine of its own: the server's part (the model goes out, four
answers come in) and the time of one client, which trains for real, one epoch by SGD; the other three answers are that
one with other numbers. All parts are measured in turn, over and over, so that what else the machine does meets all of
them alike. Messages are handed over in the process: no network makes the round longer and the ratio better.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flwr
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from tables import markdown, put, write_rows

from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.tasks import SingleLabel
from medpfl.defenses import Clip, Composition, Gaussian
from medpfl.integrations.flower import DefenseMod, GateMod, PinsMod, RecordingStrategy, VettingMod
from medpfl.models import build_model

MODELS = ("lenet_dlg:1:32", "cnn_fedavg:1:28", "resnet18:3:64")
PLAIN, RECORDER, VETTING, BOTH = "nothing", "recorder", "vetting", "recorder and vetting"
PARTS = (PLAIN, RECORDER, VETTING, BOTH, "pins", "defense", "gate")
NODES, BATCH, RATE = 4, 32, 0.01

Clock = Callable[[], float]
GOALS = {RECORDER, VETTING, BOTH}
SHARE, LEAST, SHORT = 0.05, 0.1, 2.0
"""The goal: at most this share of the round, or so many seconds where the round takes less than so many."""


@dataclass(frozen=True)
class Row:
    """One part on one model: medians over the repeats.

    added_ms: milliseconds that the part takes itself, at the server and at a client, training and Flower's own work
    left out. behind_ms: how long writing goes on behind the next round's training; what of it is longer than that
    training is part of added_ms. ratio: of the whole round to the round of the same repeat without anything.
    """

    model: str
    images: str
    entries: int
    part: str
    round_s: float
    ratio: float
    added_ms: float
    server_ms: float
    client_ms: float
    behind_ms: float
    repeats: int
    goal: str


@dataclass(frozen=True)
class Round:
    """Seconds of one round: all, the server's, the client's outside of training, and what is written behind it."""

    whole: float
    server: float
    client: float
    behind: float


class Grid:
    """Four nodes; sends nothing."""

    def get_node_ids(self) -> list[int]:
        return list(range(1, NODES + 1))


def main() -> None:
    """Measures all models and writes rows and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="NAME:CHANNELS:SIZE; default: " + ", ".join(MODELS))
    parser.add_argument("--images", type=int, default=512, help="images of a client, one epoch a round (512)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each part (5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (1)")
    parser.add_argument(
        "--processor",
        action="store_true",
        help="processor seconds of server and client instead of the wall clock, for a busy machine; what is written behind "
        "is not in them",
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="only these, beside nothing")
    parser.add_argument("--page", type=Path, help="Markdown page whose table is replaced; a .csv of its name beside it")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    clock = time.thread_time if chosen.processor else time.perf_counter
    logging.getLogger("flwr").setLevel(logging.WARNING)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    rows: list[Row] = []
    parts = [part for part in PARTS if part == PLAIN or not chosen.part or part in chosen.part]
    for text in chosen.model or MODELS:
        found = measured(text, parts, chosen.images, chosen.repeats, clock)
        rows += found
        print("\n".join(markdown(HEAD, table(found))), flush=True)
    if chosen.page is not None:
        write_rows(chosen.page.with_suffix(".csv"), rows)
        put(chosen.page, "table", [machine(chosen), "", *markdown(HEAD, table(rows))])


HEAD = (
    "model",
    "entries",
    "part",
    "round, s",
    "ratio",
    "added, ms",
    "of it server",
    "of it client",
    "written behind, ms",
    "goal",
)


def table(rows: list[Row]) -> list[list[object]]:
    """Lines of the page."""
    return [
        [row.model, f"{row.entries:,}", row.part, f"{row.round_s:.2f}", f"{row.ratio:.3f}",
         f"{row.added_ms:.0f}", f"{row.server_ms:.0f}", f"{row.client_ms:.0f}", f"{row.behind_ms:.0f}", row.goal]
        for row in rows
    ]  # fmt: skip


def machine(chosen: argparse.Namespace) -> str:
    """What was measured on what."""
    return (
        f"{'Processor seconds' if chosen.processor else 'Seconds'}; {chosen.images} images a client, batches of {BATCH}, one epoch, {NODES} clients; medians of {chosen.repeats}; "
        f"{chosen.threads} thread(s) of a machine with {os.cpu_count()} cores ({platform.machine()}); "
        f"torch {torch.__version__}, Flower {flwr.__version__}."
    )


def measured(text: str, parts: list[str], images: int, repeats: int, clock: Clock) -> list[Row]:
    """All parts on one model, interleaved; the first turn warms up and is not counted."""
    name, channels, size = text.split(":")
    shape = (int(channels), int(size), int(size))
    draw = torch.Generator().manual_seed(0)
    model = build_model(name, image_shape=shape, task=SingleLabel(2), generator=draw)
    batch = Batch(torch.rand(images, *shape, generator=draw), torch.arange(images) % 2)
    taken: dict[str, list[Round]] = {part: [] for part in parts}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        bench = Bench(model, batch, Path(folder), clock)
        for turn in range(repeats + 1):
            for part in parts:
                one = bench.round(part)
                if turn:
                    taken[part].append(one)
    rows = [row(model, part, taken[part], taken[PLAIN]) for part in parts]
    return [replace(one, images="x".join(map(str, shape))) for one in rows]


def row(model: GlobalModel, part: str, rounds: list[Round], plain: list[Round]) -> Row:
    """Medians, and whether the goal is met."""
    whole = statistics.median(one.whole for one in plain)
    server, client = (
        1000 * statistics.median(getattr(one, side) - getattr(other, side) for one, other in zip(rounds, plain, strict=True))
        for side in ("server", "client")
    )  # fmt: skip
    allowed = LEAST if whole < SHORT else SHARE * whole
    goal = "" if part not in GOALS else ("met" if server + client <= 1000 * allowed else "missed")
    return Row(
        model=model.name,
        images="",
        entries=model.parameter_count,
        part=part,
        round_s=statistics.median(one.whole for one in rounds),
        ratio=statistics.median(one.whole / other.whole for one, other in zip(rounds, plain, strict=True)),
        added_ms=server + client,
        server_ms=server,
        client_ms=client,
        behind_ms=1000 * statistics.median(one.behind for one in rounds),
        repeats=len(rounds),
        goal=goal,
    )


class Bench:
    """One model, its images, and the parts around its rounds."""

    def __init__(self, model: GlobalModel, batch: Batch, folder: Path, clock: Clock) -> None:
        self.model, self.batch, self.folder, self.clock = model, batch, folder, clock
        self.trained_for = 0.0
        self.rounds = 0
        self.state = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
        self.recipe = Recipe(
            update="weights",
            batch_size=BATCH,
            local_steps=-(-len(batch) // BATCH),
            images=len(batch),
            learning_rate=RATE,
        )

    def round(self, part: str) -> Round:
        """Seconds of one round with that part."""
        self.rounds += 1
        storage = self.folder / f"recording-{self.rounds}"
        strategy: Any = FedAvg(fraction_train=1.0, min_train_nodes=NODES, min_available_nodes=NODES)
        if part in (RECORDER, BOTH):
            strategy = RecordingStrategy(strategy, storage)
        app = ClientApp(mods=self.mods(part))
        app.train()(self.train)
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
        start = self.clock()
        messages = list(strategy.configure_train(1, ArrayRecord(self.state), ConfigRecord({"lr": RATE}), Grid()))
        sent = self.clock()
        for place, message in enumerate(messages):
            message.metadata._message_id = f"{self.rounds}-{place}"
        before = self.clock()
        first = app(messages[0], context)
        client = self.clock() - before
        if first.has_error():
            raise SystemExit(f"{part} withheld the round on {self.model.name}")
        answers = [first, *(self.answer(message, others(first, place)) for place, message in enumerate(messages[1:]))]
        before = self.clock()
        strategy.aggregate_train(1, answers)
        after = self.clock()
        if isinstance(strategy, RecordingStrategy):
            strategy.wait()
            strategy.recorder.close()
        behind = self.clock() - after
        shutil.rmtree(storage, ignore_errors=True)
        server = sent - start + after - before + max(0.0, behind - client)
        return Round(server + client, server, client - self.trained_for, behind)

    def mods(self, part: str) -> list[Callable[..., Message]]:
        """The client's mods of a part."""
        mods: Mapping[str, Callable[[], Callable[..., Message]]] = {
            VETTING: lambda: VettingMod(self.model, lambda _: self.batch),
            BOTH: lambda: VettingMod(self.model, lambda _: self.batch),
            "pins": lambda: PinsMod(config={"lr": RATE}, only_known=True, examples=len(self.batch), fewest_examples=16),
            "defense": lambda: DefenseMod(Composition(parts=(Clip(bound=1.0), Gaussian(std=1e-4))), self.model),
            "gate": lambda: GateMod(self.model, lambda _: self.batch, self.recipe),
        }
        return [mods[part]()] if part in mods else []

    def train(self, message: Message, context: Context) -> Message:
        """One epoch of plain SGD, as an app without MedPFL has it."""
        start = self.clock()
        module = self.model.module.train()
        module.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
        for place in range(0, len(self.batch), BATCH):
            optimizer.zero_grad()
            scores = module(self.batch.images[place : place + BATCH])
            torch.nn.functional.cross_entropy(scores, self.batch.targets[place : place + BATCH]).backward()
            optimizer.step()
        answer = self.answer(message, module.state_dict())
        self.trained_for = self.clock() - start
        return answer

    def answer(self, message: Message, tensors: Mapping[str, torch.Tensor]) -> Message:
        """What a client sends."""
        metrics = MetricRecord({"num-examples": len(self.batch), "loss": 0.5})
        return Message(RecordDict({"arrays": ArrayRecord(dict(tensors)), "metrics": metrics}), reply_to=message)


def others(first: Message, place: int) -> dict[str, torch.Tensor]:
    """The other clients' tensors: other numbers, so that nothing is recorded once for several."""
    tensors = first.content["arrays"].to_torch_state_dict()
    return {
        name: tensor * (1 + 1e-3 * (place + 1)) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


if __name__ == "__main__":
    main()

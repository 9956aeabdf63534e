"""What FLARE's recorder and filters take of a message, beside one local epoch. Needs `medpfl[nvflare]`.

    python benchmarks/flare_filters.py --page docs/benchmarks/flare_filters.md

Messages are handed to the filters as FLARE's chains do, in this process; an epoch is trained for real, by SGD. All parts are
measured in turn, over and over. Times are the processor's for this thread: what else the machine does is not in them, nor
is the writing of the recorder, which happens behind the training.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import nvflare
import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.filter import FilterChainType, FilterContextKey
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from tables import markdown, put, write_rows

from medpfl.core.domain import Batch, Recipe
from medpfl.core.tasks import SingleLabel
from medpfl.federation.client import client_step
from medpfl.integrations.flare import DefenseFilter, GateFilter, ReceivedFilter, RecordingFilter, VettingFilter
from medpfl.integrations.flare.recording import SHARED
from medpfl.models import build_model

MODELS = ("lenet_dlg:1:32", "cnn_fedavg:1:28", "resnet18:3:64")
BATCH, RATE, SITE = 32, 0.01, "flare_filters_site"
SHARE, LEAST, SHORT = 0.05, 0.1, 2.0
"""The goal for recorder and vetting: at most this share of the epoch, or so many seconds where it takes less than so many."""


@dataclass(frozen=True)
class Row:
    """Milliseconds of one part on one model: median and slowest; share of the epoch."""

    model: str
    entries: int
    epoch_s: float
    part: str
    median_ms: float
    slowest_ms: float
    share: float
    goal: str


def main() -> None:
    """Measures all models and writes rows and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="NAME:CHANNELS:SIZE; default: " + ", ".join(MODELS))
    parser.add_argument("--images", type=int, default=512, help="images of the epoch (512)")
    parser.add_argument("--repeats", type=int, default=5, help="messages of each part (5)")
    parser.add_argument("--page", type=Path, help="Markdown page whose table is replaced; a .csv of its name beside it")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    rows = [row for text in chosen.model or MODELS for row in measured(text, chosen.images, chosen.repeats)]
    head = ("model", "entries", "epoch, s", "part", "median, ms", "slowest, ms", "share of the epoch", "goal")
    lines = [
        [row.model, f"{row.entries:,}", f"{row.epoch_s:.2f}", row.part, f"{row.median_ms:.0f}", f"{row.slowest_ms:.0f}",
         f"{row.share:.1%}", row.goal]
        for row in rows
    ]  # fmt: skip
    print("\n".join(markdown(head, lines)))
    if chosen.page is not None:
        machine = (
            f"Processor time. One epoch of {chosen.images} images in batches of {BATCH}; {chosen.repeats} messages of each part; one thread of "
            f"a machine with {os.cpu_count()} cores ({platform.machine()}); torch {torch.__version__}, FLARE "
            f"{nvflare.__version__}."
        )
        write_rows(chosen.page.with_suffix(".csv"), rows)
        put(chosen.page, "table", [machine, "", *markdown(head, lines)])


def measured(text: str, images: int, repeats: int) -> list[Row]:
    """All parts on one model."""
    name, channels, size = text.split(":")
    shape = (int(channels), int(size), int(size))
    draw = torch.Generator().manual_seed(0)
    model = build_model(name, image_shape=shape, task=SingleLabel(2), generator=draw)
    batch = Batch(torch.rand(images, *shape, generator=draw), torch.arange(images) % 2)
    steps = -(-images // BATCH)
    recipe = Recipe(update="weights", batch_size=BATCH, local_steps=steps, learning_rate=RATE, images=images)
    started = time.thread_time()
    update, _ = client_step(model, batch, recipe)
    epoch = time.thread_time() - started
    before = {**model.parameters, **model.buffers, **model.counters}
    after = {**before, **update.trainable, **update.buffers, **update.counters}
    module = ModuleType(SITE)
    vars(module)["images"] = lambda site, round: (batch.images, batch.targets)  # noqa: ARG005  as the filters call it
    sys.modules[SITE] = module
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        parts = parts_of(name, shape, steps, images, folder)
        taken: dict[str, list[float]] = {part: [] for part in parts}
        for turn in range(repeats + 1):
            task = context()
            for part, act in parts.items():
                sent = message(before if part in ("recorder, one model sent", "received", "vetting") else after, turn)
                started = time.thread_time()
                act(sent, task)
                if turn:
                    taken[part].append(time.thread_time() - started)
                if SHARED.behind is not None:
                    SHARED.behind.wait()  # what is written behind belongs to no part
        SHARED.close()
    allowed = LEAST if epoch < SHORT else SHARE * epoch
    return [
        Row(
            name, model.parameter_count, epoch, part, 1000 * (median := statistics.median(times)), 1000 * max(times),
            median / epoch,
            "" if part not in ("vetting", "recorder, one model sent", "recorder, one answer")
            else ("met" if median <= allowed else "missed"),
        )
        for part, times in taken.items()
    ]  # fmt: skip


def parts_of(
    name: str, shape: tuple[int, ...], steps: int, images: int, folder: str
) -> dict[str, Callable[[Shareable, FLContext], Any]]:
    """What is measured, in the order of a round."""
    model = {"model": name, "image_shape": list(shape)}
    own = {"images": f"{SITE}:images"}
    out, back = RecordingFilter(f"{folder}/recording"), RecordingFilter(f"{folder}/recording")
    out.set_prop(FilterContextKey.CHAIN_TYPE, FilterChainType.TASK_DATA_CHAIN)
    back.set_prop(FilterContextKey.CHAIN_TYPE, FilterChainType.TASK_RESULT_CHAIN)
    parts = {"compose": [{"name": "clip", "bound": 1.0}, {"name": "gaussian", "std": 0.01}]}
    recipe = {"batch_size": BATCH, "local_steps": steps, "learning_rate": RATE, "images": images}
    site = f"{folder}/site"
    return {
        "recorder, one model sent": out.process,
        "received": ReceivedFilter(site).process,
        "vetting": VettingFilter(site, **model, **own).process,
        "defense": DefenseFilter(site, parts, **model).process,
        "gate": GateFilter(site, **model, **own, recipe=recipe, guard={"images": images}).process,
        "recorder, one answer": back.process,
    }


def message(tensors: dict[str, torch.Tensor], number: int) -> Shareable:
    """A model or an answer as FLARE carries it, other numbers in every turn."""
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    first = next(iter(arrays))
    arrays[first] = arrays[first] + 1e-6 * number
    made = DXO(DataKind.WEIGHTS, arrays, {"NUM_STEPS_CURRENT_ROUND": 1}).to_shareable()
    made.set_header("current_round", number)
    return made


def context() -> FLContext:
    """A task at the site, with the site at the server's other end."""
    made, peer = FLContext(), FLContext()
    for one in (made, peer):
        one.set_prop(ReservedKey.IDENTITY_NAME, "site-1", private=False, sticky=False)
        one.set_prop(FLContextKey.TASK_NAME, "train", private=True, sticky=False)
    made.set_peer_context(peer)
    return made


if __name__ == "__main__":
    main()

"""How an audit is cut into work: cases, chunks and the settings that results depend on to the bit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from medpfl.audit.grid import Cell
from medpfl.audit.spec import Spec
from medpfl.core.devices import accelerator, choose_device, device_of_worker
from medpfl.core.domain import GlobalModel
from medpfl.core.memory import MOST_BY_DEFAULT, default_budget

Device = torch.device

SMALL_MODEL_PARAMETERS = 1_000_000
"""Models up to this size are attacked many victims at a time; larger ones one by one."""
CHUNK_VICTIMS = 8


@dataclass(frozen=True)
class Plan:
    """Stored when an audit starts. Equal plans give equal results to the bit, whatever the number of workers.

    threads: of one worker. device: `cpu`, `cuda` (any of the GPUs) or `cuda:N`. accelerator: name of the GPU.
    memory: bytes that a search of one worker may take.
    """

    threads: int = 1
    device: str = "cpu"
    accelerator: str = ""
    memory: int = MOST_BY_DEFAULT
    backend: str = "eager"
    torch: str = torch.__version__
    chunk_victims: int = CHUNK_VICTIMS

    @property
    def where(self) -> Device:
        """Where a process without a number computes."""
        return device_of_worker(self.device, 0)

    def as_plain(self) -> dict[str, Any]:
        """The plan as JSON-like values."""
        return asdict(self)


def make_plan(spec: Spec, device: str | None = None, stored: Mapping[str, Any] | None = None) -> Plan:
    """The plan for a spec on this machine; `device` overrides the spec's, and `auto` goes on where it started.

    stored: the plan that the audit was started with. Raises `SpecError` where a device cannot be had.
    """
    wanted, where = (spec.device, "device") if device is None else (device, "--device")
    if wanted == "auto" and stored is not None:
        wanted = str(stored.get("device", wanted))
    found = choose_device(wanted, where)
    memory = spec.memory
    if memory is None:
        fitting = default_budget(device_of_worker(found, 0), 1 if found != "cpu" else max(1, cores() // spec.threads))
        memory = fitting if stored is None else int(stored.get("memory", fitting))
    return Plan(threads=spec.threads, device=found, accelerator=accelerator(found), memory=memory)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Chunk:
    """Cases of one cell and seed that are computed together."""

    cell: str
    seed: int
    victims: tuple[int, ...]

    @property
    def id(self) -> str:
        """Readable id."""
        return f"{self.cell}/s{self.seed}/v{self.victims[0]}-{self.victims[-1]}"


def case_id(cell: str, seed: int, victim: int) -> str:
    """Id of one victim in one cell with one seed, the `case` column.

    >>> case_id("brain/lenet/none", 0, 3)
    'brain/lenet/none/s0/v3'
    """
    return f"{cell}/s{seed}/v{victim}"


def chunks(spec: Spec, cell: Cell, model: GlobalModel, plan: Plan) -> Iterable[Chunk]:
    """The chunks of one cell, over all seeds."""
    parameters = model.parameter_count + cell.attack.attack.added_parameters(model, cell.channel.channel.client_count)
    size = plan.chunk_victims if parameters <= SMALL_MODEL_PARAMETERS else 1
    victims = range(cell.victims)
    for seed in spec.seeds:
        for start in range(0, len(victims), size):
            yield Chunk(cell.id, seed, tuple(victims[start : start + size]))

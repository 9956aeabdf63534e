"""What measuring utility will take, before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import TypeAdapter

from medpfl.audit.estimate import shortest
from medpfl.audit.grid import Cell
from medpfl.audit.preparation import Prepared
from medpfl.audit.utility import Measurement, UtilityRun
from medpfl.core.devices import moved
from medpfl.core.domain import Batch
from medpfl.core.recipes import Recipe
from medpfl.federation.client import client_step
from medpfl.federation.federated import fitted


def utility_seconds(prepared: Prepared) -> float:
    """Seconds on one core that the federations take: one client step of each setting is timed and multiplied."""
    cells = {cell.id: cell for cell in prepared.cells}
    how, seen, total = prepared.spec.utility, set[str](), 0.0
    for one in prepared.utility if how is not None else ():
        fresh = {run.key: run for run in one.runs if run.key not in seen}
        seen |= fresh.keys()
        if fresh and how is not None:
            steps = how.rounds * sum(_client_steps(one, run) for run in fresh.values())
            total += steps * _client_step_seconds(prepared, cells[one.cells[0]], one.recipe, min(one.clients))
    return total


def _client_steps(one: Measurement, run: UtilityRun) -> int:
    """Local steps of all clients in a round."""
    sizes = one.clients if run.client is None else one.clients[run.client : run.client + 1]
    return sum(-(-images // int(one.recipe["batch_size"])) for images in sizes) * int(one.recipe["epochs"])


def _client_step_seconds(prepared: Prepared, cell: Cell, plain: Mapping[str, Any], held: int) -> float:
    """Of one batch under the cell's defense."""
    materials, seed = prepared.materials, prepared.spec.seeds[0]
    recipe = TypeAdapter(Recipe).validate_python({**plain, "betas": tuple(plain["betas"]), "epochs": 1})
    pool = materials.pool(cell.dataset, seed)
    places = list(pool.split.training[: min(recipe.batch_size, held)])
    batch = moved(Batch(pool.dataset.images[places], pool.dataset.targets[places]), materials.device)
    model, own = moved(materials.initial_model(cell, seed), materials.device), fitted(recipe, len(places))
    stream = torch.Generator().manual_seed(0)
    return shortest(lambda: client_step(model, batch, own, hooks=cell.defense.defense, generator=stream), 2, prepared)

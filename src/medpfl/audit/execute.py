"""Computes the cases of one chunk: client step, observation, attack, score."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from medpfl.attacks.crafted import CraftedAttack
from medpfl.audit.grid import Cell
from medpfl.audit.materials import Materials
from medpfl.audit.plan import Chunk, case_id
from medpfl.audit.rounds import broadcast, client_round, followed, known_defense, known_recipe, seen_model
from medpfl.audit.rows import Case, Outcome, Row, case_rows, held_by
from medpfl.core.devices import CPU, moved
from medpfl.core.domain import (
    Failure,
    GlobalModel,
    Knowledge,
    Observation,
)
from medpfl.core.functional import is_finite
from medpfl.core.seeding import generator
from medpfl.core.session import Session
from medpfl.federation.rounds import RoundResult
from medpfl.models.batch_norm import batch_norm_layers, forward_with_statistics


def compute(materials: Materials, cell: Cell, chunk: Chunk, out: Path, session: Session) -> list[Row]:
    """Result rows of all cases of a chunk, one per private image; images are written below `out`."""
    broadcast(materials, cell, chunk.seed, chunk.victims[0], session)  # training or crafting a model is no case's time
    started = time.perf_counter()
    truths = {victim: materials.truth(cell, chunk.seed, victim) for victim in chunk.victims}
    observations: dict[int, Observation] = {}
    rounds: dict[int, RoundResult] = {}
    outcomes: dict[int, Outcome] = {}
    for victim, truth in truths.items():
        result = rounds[victim] = client_round(materials, cell, chunk.seed, victim)
        update = result.update
        if update is None or all(map(result.withheld, held_by(truth))):
            outcomes[victim] = None
        elif all(is_finite(tensor) for tensor in update.trainable.values()):
            observations[victim] = _observe(materials, cell, chunk.seed, victim, result)
        else:
            outcomes[victim] = Failure(
                "the client's update is not finite: its own training diverged, nothing was attacked"
            )
    if observations:
        generators = [generator("attack", chunk.seed, case_id(cell.stream, chunk.seed, v)) for v in observations]
        results = cell.attack.attack.reconstruct(list(observations.values()), generators, session)
        outcomes.update(zip(observations, moved(results, CPU), strict=True))
    seconds = (time.perf_counter() - started) / len(chunk.victims)
    rows: list[Row] = []
    for victim in chunk.victims:
        case = Case(materials, cell, chunk.seed, victim, truths[victim], rounds[victim])
        rows += case_rows(case, outcomes[victim], seconds, out)
    return rows


def failed_rows(materials: Materials, cell: Cell, chunk: Chunk, reason: str, out: Path) -> list[Row]:
    """Rows of cases that could not be computed at all."""
    rows: list[Row] = []
    for victim in chunk.victims:
        truth = materials.truth(cell, chunk.seed, victim)
        rows += case_rows(Case(materials, cell, chunk.seed, victim, truth), Failure(reason), None, out)
    return rows


def _observe(materials: Materials, cell: Cell, seed: int, victim: int, result: RoundResult) -> Observation:
    """What the adversary sees of a round; granted knowledge that the attack does not read is left out."""
    assert result.update is not None  # the caller sees to that
    sent = broadcast(materials, cell, seed, victim)
    model = seen_model(materials, cell, seed, victim)
    read, truth = cell.read, materials.everybody(cell, seed, victim, result.senders)
    images = moved(truth.images, materials.device)
    knowledge = Knowledge(
        labels=truth.labels if "labels" in read else None,
        masks=truth.masks if "masks" in read else None,
        logits=model.forward(images)[0].detach() if "logits" in read else None,
        batch_norm_statistics=_batch_norm_statistics(model, images, cell.recipe.recipe.batch_norm)
        if "batch_norm_statistics" in read
        else None,
        auxiliary=materials.auxiliary(cell, seed) if "auxiliary" in read else None,
        defense=known_defense(cell),
    )
    return Observation(
        model=model,
        update=result.update,
        recipe=known_recipe(cell) if sent.recipe is None else followed(cell, sent),
        threat_model=cell.threat_model.name,
        knowledge=moved(knowledge, materials.device),
        clients=len(result.senders),
        senders=result.senders,
        earlier=result.earlier,
        broadcast=sent if isinstance(cell.attack.attack, CraftedAttack) else None,
    )


def _batch_norm_statistics(model: GlobalModel, images: Tensor, mode: Literal["train", "eval"]) -> dict[str, Tensor]:
    """Per batch norm layer `LAYER.mean` and `LAYER.variance` (biased) of what it receives for the private images."""
    with torch.no_grad():
        _, found = forward_with_statistics(model, images, batch_norm_layers(model), batch_norm=mode)
    return {
        f"{path}.{name}": tensor
        for path, both in found.items()
        for name, tensor in zip(("mean", "variance"), both, strict=True)
    }

"""What the three looks at a round say of it: vetting of tensors, vetting of a model at work, the gate after training."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from detector.honest import Round
from medpfl.attacks.updates import gradient_view
from medpfl.core.domain import GlobalModel, Observation, Tensors, Update
from medpfl.core.errors import ModelError
from medpfl.federation.changes import sent_change
from medpfl.federation.client import client_step
from medpfl.federation.guarding import Received, Trained
from medpfl.guards.leakage_gate import CHAIN_CROSSING, CHAIN_SHARE, FEWEST_SAMPLES, LeakageGate
from medpfl.guards.self_test import SelfTest, self_test
from medpfl.guards.signs import relative_changes, thrown_alone
from medpfl.guards.vetting import CHECKS, Evidence, Result, vet
from medpfl.guards.vetting.layers import layers_of
from medpfl.guards.vetting.verdict import tensors_of
from medpfl.models.state import apply_state

VETTED = 16
"""Of its own images a client vets with so many."""


@dataclass(frozen=True)
class Scores:
    """Verdicts of the looks with their shipped thresholds, every check's score, seconds of vetting and of the gate.

    structure: of the checks that need no model to run. behavior: of all checks of vetting. agreed: of whether the
    tensors fit the model that was agreed on. reference: of what changed since the model of the round before.
    """

    structure: str
    behavior: str
    gate: str
    agreed: str
    reference: str
    values: Mapping[str, float]
    seconds: tuple[float, float]


def scored(held: Round, generator: torch.Generator) -> tuple[Scores, Update]:
    """Vets the model, takes the client step, and looks at the update.

    Where the round has no earlier model the one that came is the earlier one, and what the client's own update makes of
    it is compared with it: what an honest server with one client sends next.
    """
    start = time.perf_counter()
    vetting = vet(held.model, images=held.batch.images[:VETTED])
    vetted = time.perf_counter()
    update, _ = client_step(held.model, held.batch, held.recipe, generator=generator)
    trained = Trained(Received(held.model, held.batch, held.recipe), update, [torch.arange(len(held.batch))])
    stepped = time.perf_counter()
    gate = LeakageGate().after(trained)
    passed = time.perf_counter()
    earlier = held.earlier or held.model
    later = held.model if held.earlier else _moved(held.model, sent_change(update, held.model.parameters))
    compared = _compared(later, earlier)
    misfit = float(not _fits(held.model, earlier))
    vetted_scores = {f"{result.about}.{result.check}": result.score for result in vetting.results if _measured(result)}
    return Scores(
        structure=_verdict([result for result in vetting.results if result.about == "structure"]),
        behavior=vetting.verdict,
        gate=gate.level,
        agreed="crafted" if misfit else "passed",
        reference="crafted" if any(score > LIMITS[name][0] for name, score in compared.items()) else "passed",
        values={**vetted_scores, **gate_values(trained), "agreed.model": misfit, **compared},
        seconds=(vetted - start, passed - stepped),
    ), update


def _moved(model: GlobalModel, change: Tensors) -> GlobalModel:
    moved = {name: (tensor + change[name]).to(tensor.dtype) for name, tensor in model.parameters.items()}
    return replace(model, parameters=moved)


def _fits(model: GlobalModel, agreed: GlobalModel) -> bool:
    try:
        apply_state(agreed, tensors_of(model), "what was received")
    except ModelError:
        return False
    return True


def _compared(model: GlobalModel, earlier: GlobalModel) -> dict[str, float]:
    """The scores of the checks that need a reference; none of tensors that are not finite."""
    tensors = tensors_of(model)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        return {}
    evidence = Evidence(tensors, layers_of(tensors), tensors_of(earlier))
    found = {entry.name: entry.item.measure(evidence) for entry in CHECKS if entry.item.about == "reference"}
    return {f"reference.{name}": measured.score for name, measured in found.items() if measured is not None}


def _verdict(results: Sequence[Result]) -> str:
    found = {result.means for result in results if result.status == "found"}
    return next((word for word in ("crafted", "leaks") if word in found), "passed")


def gate_values(trained: Trained) -> dict[str, float]:
    """What the gate's findings rest on: shares of images, excess over chance, the largest relative change.

    That counts up to its limit where most weights changed as much. Nothing of numbers that are not finite.
    """
    received, recipe = trained.received, trained.received.recipe
    if not all(bool(torch.isfinite(tensor).all()) for tensor in trained.update.trainable.values()):
        return {}
    gradient = gradient_view(Observation(received.model, trained.update, recipe, "client")).tensors
    several = trained.steps if len(trained.steps) > 1 else ()
    test = self_test(received.model, gradient, received.batch, steps=several, batch_norm=recipe.batch_norm)
    change = sent_change(trained.update, received.model.parameters)
    rate = recipe.learning_rate if trained.update.kind == "gradient" else 1.0
    moved = relative_changes(received.model.parameters, change)
    classes = received.model.task.classes
    head = next((name for name in reversed(list(moved)) if len(received.model.parameters[name]) == classes), "")
    moved.pop(head, None)
    largest = rate * max(moved.values(), default=0.0)
    alone = bool(moved) and thrown_alone(moved)
    return {
        "gate.images": test.returned / len(received.batch),
        "gate.excess": max((layer.excess for layer in test.layers), default=0.0),
        "gate.sorted": _sorted(test),
        "gate.change": largest if alone else min(largest, LeakageGate().change),
    }


def _sorted(test: SelfTest) -> float:
    """How nearly units of a layer that gives enough samples back sort them as bins do: 1 less the pairs that cross."""
    found = [
        1.0 - layer.crossing
        for layer in test.layers
        if layer.crossing is not None and layer.share >= CHAIN_SHARE and layer.samples >= FEWEST_SAMPLES
    ]
    return max(found, default=0.0)


def _measured(result: Result) -> bool:
    return result.status != "not checked" and math.isfinite(result.score)


def thresholds() -> dict[str, tuple[float, str]]:
    """Shipped threshold and meaning of every score."""
    found = {f"{entry.item.about}.{entry.name}": (entry.item.threshold, entry.item.means) for entry in CHECKS}
    gate = LeakageGate()
    return {
        **found,
        "agreed.model": (0.0, "crafted"),
        "gate.images": (0.0, "leaks"),
        "gate.excess": (gate.excess, "crafted"),
        "gate.sorted": (1.0 - CHAIN_CROSSING, "crafted"),
        "gate.change": (gate.change, "crafted"),
    }


LIMITS = thresholds()

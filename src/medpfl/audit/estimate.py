"""What an audit will take, before it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from medpfl.attacks.crafted import CraftedAttack
from medpfl.audit.grid import Cell
from medpfl.audit.plan import SMALL_MODEL_PARAMETERS
from medpfl.audit.preparation import Prepared
from medpfl.audit.sizes import added_entries, round_bytes
from medpfl.audit.targets import targets_of
from medpfl.audit.trained_models import changed_by, model_kind, training_kind
from medpfl.core.devices import moved, repeatable
from medpfl.core.domain import Batch, Broadcast
from medpfl.core.memory import peak_bytes
from medpfl.core.seeding import content_hash
from medpfl.federation.client import client_step
from medpfl.federation.guarding import NO_GUARD, Guarding
from medpfl.federation.rounds import guarded_round
from medpfl.federation.training import train
from medpfl.guards import NoGuard

MATCHING_STEP = 3.0
"""Cost of one gradient evaluation of an attack in units of one client gradient (measured 2.7 to 3 in eager mode)."""
BATCHED_STEP = 1.0
"""The same per victim for small models, whose victims are computed together (measured 0.5 to 1.5 on LeNets)."""

SECONDS_PER_ADDED = 1e-9
"""Time of a step per image and entry that a crafted model has more (measured 0.1 to 0.5 ns on one core)."""


GUARDING_PER_ADDED = 1e-7
"""Time that a guard takes per entry that a crafted model has more (measured 0.06 to 0.1 us each for vetting, half of it for the gate)."""


@dataclass(frozen=True)
class CellEstimate:
    """Upper bound on the seconds of one cell on one core, and the bytes of tensors that one candidate takes, measured.

    A search computes as many candidates at once as fit the plan's memory. Where the server adds to the model, the bytes
    of a round with all that it adds are counted too.
    """

    cell: Cell
    cases: int
    seconds: float
    memory: float


def estimate(prepared: Prepared) -> list[CellEstimate]:
    """Times one client gradient per model and multiplies by the attacks' budgets. Attacks that stop early take less."""
    timed: dict[tuple[str, ...], tuple[float, float]] = {}
    guarded: dict[tuple[str, ...], float] = {}
    found = []
    for cell in prepared.runnable:
        seed = prepared.spec.seeds[0]
        model = prepared.materials.initial_model(cell, seed, 0)
        key = (*model_kind(cell), cell.recipe.id)
        if key not in timed:
            timed[key] = _gradient_seconds(prepared, cell), _candidate_bytes(prepared, cell)
        images = cell.recipe.recipe.private_images
        cases = cell.victims * len(prepared.spec.seeds)
        evaluations = cell.attack.attack.evaluations(model, images)
        step = BATCHED_STEP if model.parameter_count <= SMALL_MODEL_PARAMETERS else MATCHING_STEP
        seconds, memory = timed[key]
        added = added_entries(cell, model)
        if (*key, cell.guard.id) not in guarded:
            guarded[*key, cell.guard.id] = _guard_seconds(prepared, cell)
        taken = cases * evaluations * step * seconds + _crafting_seconds(cell, prepared, cases, seconds, added)
        taken += cases * cell.channel.channel.client_count * (guarded[*key, cell.guard.id] + added * GUARDING_PER_ADDED)
        found.append(CellEstimate(cell, cases, taken, memory + round_bytes(cell, model)))
    return found


def _crafting_seconds(cell: Cell, prepared: Prepared, cases: int, gradient: float, added: int) -> float:
    """What simulated rounds and the clients' own steps take where the server sends a larger model than agreed."""
    attack, clients = cell.attack.attack, cell.channel.channel.client_count
    if not isinstance(attack, CraftedAttack):
        return 0.0
    models = len(prepared.spec.seeds) * (cell.victims if cell.model.state == "untrained_per_victim" else 1)
    steps = models * attack.simulated_steps(clients) + cases * clients
    return steps * (gradient + cell.recipe.recipe.private_images * added * SECONDS_PER_ADDED)


def training_seconds(prepared: Prepared) -> float:
    """Seconds on one core that training the models takes: one step of each is timed and multiplied."""
    trained = {(cell.dataset.id, cell.model.id): cell for cell in prepared.runnable if cell.model.training is not None}
    longest: dict[str, Cell] = {}  # one run serves all stages of a training
    for cell in sorted(trained.values(), key=lambda cell: _steps(prepared, cell)):
        longest[content_hash(cell.dataset.id, training_kind(cell.model), *changed_by(cell))] = cell
    return sum(_training_seconds(prepared, cell) for cell in longest.values()) * len(prepared.spec.seeds)


def _steps(prepared: Prepared, cell: Cell) -> int:
    assert cell.model.training is not None  # the caller sees to that
    images = prepared.materials.training_images(cell.dataset, cell.model, prepared.spec.seeds[0])
    return cell.model.training.total_steps(len(images))


def _training_seconds(prepared: Prepared, cell: Cell) -> float:
    materials, seed, config = prepared.materials, prepared.spec.seeds[0], cell.model.training
    assert config is not None  # the caller sees to that
    indices = materials.training_images(cell.dataset, cell.model, seed)
    model, dataset = materials.initial_model(cell, seed), materials.dataset(cell.dataset)
    images, targets = dataset.images[indices], targets_of(dataset, cell.model)[indices]
    one, generator = replace(config, epochs=None, steps=1), torch.Generator().manual_seed(0)
    model = moved(model, materials.device)
    step = shortest(lambda: train(model, images, targets, one, generator), 2, prepared)
    return step * _steps(prepared, cell)


def _gradient_seconds(prepared: Prepared, cell: Cell) -> float:
    seed = prepared.spec.seeds[0]
    model = prepared.materials.initial_model(cell, seed, 0)
    truth = prepared.materials.client(cell, seed, 0, 0)
    placed = moved((model, Batch(truth.images, truth.targets)), prepared.materials.device)
    generator = torch.Generator().manual_seed(0)
    return shortest(lambda: client_step(*placed, cell.recipe.recipe, generator=generator), 5, prepared)


def _guard_seconds(prepared: Prepared, cell: Cell) -> float:
    """What the cell's guard adds to one client's round with the model as agreed, as far as it lets the round go."""
    if isinstance(cell.guard.guard, NoGuard):
        return 0.0
    seed, recipe = prepared.spec.seeds[0], cell.recipe.recipe
    model = prepared.materials.initial_model(cell, seed, 0)
    truth = prepared.materials.client(cell, seed, 0, 0)
    placed = moved((model, Batch(truth.images, truth.targets)), prepared.materials.device)

    def work(guard: Guarding) -> None:
        generator = torch.Generator().manual_seed(0)
        clients = [(placed[1], torch.Generator().manual_seed(0))]
        guarded_round(Broadcast((placed[0],)), clients, recipe, guard=guard, agreed=placed[0], generator=generator)

    with_guard = shortest(lambda: work(cell.guard.guard), 2, prepared)
    return max(0.0, with_guard - shortest(lambda: work(NO_GUARD), 2, prepared))


def _candidate_bytes(prepared: Prepared, cell: Cell) -> float:
    """The peak of what a matching attack computes for one candidate: its update, differentiated in its images."""
    model = prepared.materials.initial_model(cell, prepared.spec.seeds[0], 0)
    truth = prepared.materials.client(cell, prepared.spec.seeds[0], 0, 0)
    recipe = replace(cell.recipe.recipe, precision="float32")

    def work() -> None:
        images = truth.images.clone().requires_grad_()
        generator = torch.Generator().manual_seed(0)
        update, _ = client_step(model, Batch(images, truth.targets), recipe, generator=generator)
        square = torch.stack([tensor.square().sum() for tensor in update.trainable.values()]).sum()
        torch.autograd.grad(square, images, allow_unused=True)

    return float(peak_bytes(work))


def shortest(work: Callable[[], object], repeats: int, prepared: Prepared) -> float:
    """The shortest time that it takes, with the threads and on the device of the workers."""
    times = []
    device = prepared.materials.device
    with repeatable(device, prepared.plan.threads):
        for _ in range(repeats):
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
    return min(times)

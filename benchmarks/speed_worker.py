"""One side of one case in a process of its own: prepares, then times one repetition for every line it reads.

Run by `speed.py`. Prints one JSON object per line: first what preparing took, then one timing per repetition.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable

import torch
from peer import make_peer
from speed_cases import CASES, LEARNING_RATE, TOTAL_VARIATION, Case, Side
from torch import Tensor

from medpfl.attacks.matching.adam import Adam
from medpfl.attacks.matching.gradients import Layout, matching_objective
from medpfl.attacks.matching.objectives import DISTANCES
from medpfl.attacks.matching.priors import no_prior, smooth
from medpfl.attacks.matching.problem import build_problem
from medpfl.core.domain import GlobalModel, Observation, Recipe, Update
from medpfl.core.tasks import SingleLabel
from medpfl.models import MODELS, prepare

CLASSES = 10

PUBLISHED_ITERATIONS = 24_000
"""Of both sides' preset; MedPFL compiles small models where so many pay for it."""

Run = Callable[[], int]
"""Does one repetition and says how many candidate-iterations it did."""


def main() -> None:
    """Prepares the side named on the command line and times it until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["medpfl", "breaching", "training"])
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    case: Case = CASES[arguments.case]
    device = torch.device(arguments.device)
    net = MODELS[case.network].item((3, case.size, case.size), CLASSES, torch.Generator().manual_seed(0)).eval()
    net.to(device)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(case.victims, 1, 3, case.size, case.size, generator=generator).to(device)
    labels = torch.randint(CLASSES, (case.victims, 1), generator=generator).to(device)
    probe = torch.rand(1, 3, case.size, case.size, generator=generator).to(device)
    sides: dict[Side, Callable[[], tuple[Run, float]]] = {
        "medpfl": lambda: ours(case, net, images, labels, probe),
        "breaching": lambda: breaching(case, net, images, labels, probe),
        "training": lambda: training(case, net, device),
    }
    before = peak(device)
    run, value = sides[arguments.side]()
    start = time.perf_counter()
    run()
    first = finished(device) - start
    report({"objective": value, "first_s": first, "before_mb": before})
    for _ in sys.stdin:
        wall, busy = time.perf_counter(), time.process_time()
        count = run()
        wall, busy = finished(device) - wall, time.process_time() - busy
        report({"wall_ms": 1e3 * wall / count, "busy_ms": 1e3 * busy / count, "peak_mb": peak(device) - before})


def report(line: dict[str, float]) -> None:
    """One line of JSON."""
    print(json.dumps(line), flush=True)


def finished(device: torch.device) -> float:
    """The time once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak(device: torch.device) -> float:
    """Most memory that the process has held so far, in MB: of the GPU where it computes there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def observed(net: torch.nn.Module, image: Tensor, label: Tensor) -> list[Tensor]:
    """The gradient of one image's loss, in the order of the parameters."""
    loss = torch.nn.functional.cross_entropy(net(image), label)
    return list(torch.autograd.grad(loss, list(net.parameters())))


def ours(case: Case, net: torch.nn.Module, images: Tensor, labels: Tensor, probe: Tensor) -> tuple[Run, float]:
    """Signed Adam on cosine and total variation, all candidates at once."""
    model = prepare(net, name=case.network, image_shape=(3, case.size, case.size), task=SingleLabel(CLASSES))
    observations = [observation(model, net, image, label) for image, label in zip(images, labels, strict=True)]
    problem = build_problem(observations, "float32")
    layout = Layout((1, 3, case.size, case.size))
    weights = torch.ones(case.victims, len(problem.names), device=images.device)
    plain, objective = (
        matching_objective(
            problem,
            layout,
            labels,
            distance=DISTANCES["cosine"],
            weights=weights,
            prior=prior,
            evaluations=case.candidates * PUBLISHED_ITERATIONS,
        )
        for prior in (no_prior, smooth(TOTAL_VARIATION))
    )
    value = float(plain(probe.reshape(1, -1), torch.zeros(1, dtype=torch.int64, device=probe.device))[0])
    del plain
    solver = Adam(
        layout=layout, iterations=10**6, learning_rate=LEARNING_RATE, scale=(1.0, 1.0, 1.0), block=case.iterations
    )
    victims = torch.arange(case.victims, device=images.device).repeat_interleave(case.candidates // case.victims)
    start = torch.randn(case.candidates, layout.size, generator=torch.Generator().manual_seed(2)).to(images.device)
    state = solver.start(objective, start, victims, torch.zeros(case.candidates, device=images.device))

    def run() -> int:
        nonlocal state
        state = solver.advance(objective, state)
        return case.iterations * case.candidates

    return run, value


def observation(model: GlobalModel, net: torch.nn.Module, image: Tensor, label: Tensor) -> Observation:
    """What an eavesdropper sees of one image."""
    gradients = dict(zip((name for name, _ in net.named_parameters()), observed(net, image, label), strict=True))
    return Observation(model, Update("gradient", gradients, {}, {}, 1), Recipe(batch_size=1), "eavesdropper")


def breaching(case: Case, net: torch.nn.Module, images: Tensor, labels: Tensor, probe: Tensor) -> tuple[Run, float]:
    """breaching's preset `invertinggradients` on one victim, one restart (restarts run one after the other)."""
    settings = [
        f"optim.max_iterations={case.other_iterations}",
        f"regularization.total_variation.scale={TOTAL_VARIATION}",
        f"optim.step_size={LEARNING_RATE}",
    ]
    shape = (3, case.size, case.size)
    peer = make_peer(net, observed(net, images[0], labels[0]), shape, CLASSES, settings, labels[0])
    attacker, shared = peer.attacker, peer.shared
    models, used, stats = attacker.prepare_attack(peer.payload, shared)
    attacker.objective.initialize(torch.nn.CrossEntropyLoss(), attacker.cfg.impl, None)
    value = float(attacker.objective(models[0], shared[0]["gradients"], probe, used)[0].detach())

    def run() -> int:
        attacker._run_trial(models, shared, used, stats, 0)
        return case.other_iterations

    return run, value


def training(case: Case, net: torch.nn.Module, device: torch.device) -> tuple[Run, float]:
    """Forward and backward pass of a batch of 8 through the plain module."""
    batch, targets = torch.rand(8, 3, case.size, case.size, device=device), torch.arange(8, device=device)

    def run() -> int:
        for _ in range(case.other_iterations):
            net.zero_grad()
            torch.nn.functional.cross_entropy(net(batch), targets).backward()
        return 8 * case.other_iterations

    return run, float("nan")


if __name__ == "__main__":
    main()

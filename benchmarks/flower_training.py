"""Leakage over a whole training with Flower, by attack, and what noise as a mod and SecAgg+ change. Needs `medpfl[flower]`.

    python benchmarks/flower_training.py train  --data ../shared/data/brain_mri --out out/flower_training
    python benchmarks/flower_training.py replay --out out/flower_training
    python benchmarks/flower_training.py longer --out out/flower_training
    python benchmarks/flower_training.py seeds  --data ../shared/data/brain_mri --out out/flower_training
    python benchmarks/flower_training.py page   --out out/flower_training --page docs/benchmarks/flower_training.md

`train` runs the example (`flwr run`, four nodes) for every recipe: plain, behind clipping and noise as a mod, behind SecAgg+.
`replay` attacks rounds from the first to the last and writes one report per recipe (`out/flower_training/RECIPE-replay`); it
goes on where it was stopped. `longer` gives the attacks five times the gradients, in the first round of plain trainings. `seeds` trains plain and with noise for more seeds by the example's own functions outside of
Flower, for utility only. `page` writes the table, the CSV beside it and the figure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "flower"
sys.path.insert(0, str(EXAMPLE))

NOISE, BOUND = {"weak": 0.001, "noise": 0.01}, 1.0
"""Standard deviations of the noise on each entry of a client's change of weights, after clipping the change's norm."""
CLIENTS = 4


@dataclass(frozen=True)
class Plan:
    """How one kind of client trains, and what is attacked of it.

    steps of `batch` images in each round; replayed: rounds that are attacked. together: the recipe by which the server
    reads the mean behind SecAgg+, whose protocol takes long, so that it has fewer rounds.
    """

    name: str
    words: str
    batch: int
    steps: int
    rate: float
    rounds: int
    replayed: tuple[int, ...]
    variants: tuple[str, ...]
    secure_rounds: int = 0

    @property
    def recipe(self) -> dict[str, Any]:
        """As in a spec."""
        return {"batch_size": self.batch, "local_steps": self.steps, "learning_rate": self.rate}

    @property
    def together(self) -> dict[str, Any]:
        """The mean over all clients, read as one client with larger batches: exact for one step, else an approximation."""
        return {**self.recipe, "batch_size": self.batch * CLIENTS}


def defense(variant: str) -> dict[str, Any] | None:
    """What clients do to their updates, as in a spec."""
    if variant not in NOISE:
        return None
    return {"compose": [{"name": "clip", "bound": BOUND}, {"name": "gaussian", "std": NOISE[variant]}]}


SHORT, LONG = 240, 1200
"""Gradients that an attack spends: in every round of every training; in the first round of plain ones."""


def searched(evaluations: int, steps: int) -> tuple[Mapping[str, Any], ...]:
    """Matching attacks that spend about as many gradients each; one iteration of a client of several steps takes that many."""
    iterations = evaluations // steps
    found: list[Mapping[str, Any]] = [
        {"name": "gradinv", "iterations": iterations},
        {"name": "maximum_a_posteriori", "iterations": iterations},
    ]
    if steps == 1:
        return ({"name": "idlg", "iterations": evaluations // 20, "restarts": 1}, *found)
    return ({"name": "fedavg_inversion", "iterations": iterations}, *found)


PLANS = (
    Plan("image", "one step on 1 image", 1, 1, 0.06, 100, (1, 10, 50, 100), ("plain", "weak", "noise")),
    Plan("step", "one step on 4 images", 4, 1, 0.1, 60, (1, 20, 40, 60), ("plain", "weak", "noise", "secure"), 50),
    Plan("epoch", "an epoch of four steps on 4 images each", 4, 4, 0.05, 100, (1, 33, 66, 100),
         ("plain", "noise", "secure"), 40),
)  # fmt: skip
IMAGES = 16
"""Images of each client."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "replay", "longer", "seeds", "page"])
    parser.add_argument("--out", type=Path, default=Path("out/flower_training"))
    parser.add_argument("--data", default="", help="folder of brain MRI")
    parser.add_argument("--recipes", nargs="*", default=[plan.name for plan in PLANS])
    parser.add_argument("--seeds", type=int, default=10, help="seeds of `seeds`")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks/flower_training.md"))
    arguments = parser.parse_args()
    chosen = [plan for plan in PLANS if plan.name in arguments.recipes]
    if arguments.what == "train":
        for plan in chosen:
            trained(plan, arguments.out, arguments.data)
    elif arguments.what == "replay":
        for plan in chosen:
            replayed(plan, arguments.out, plan.variants, plan.replayed, SHORT, f"{plan.name}-replay")
    elif arguments.what == "longer":
        for plan in chosen:
            replayed(plan, arguments.out, ("plain",), plan.replayed[:1], LONG, f"{plan.name}-longer")
    elif arguments.what == "seeds":
        seeds(chosen, arguments.out, arguments.data, arguments.seeds)
    else:
        from flower_training_page import write_page

        write_page(chosen, arguments.out, arguments.page)
    return 0


def trained(plan: Plan, out: Path, data: str) -> None:
    """The trainings of one recipe; those that are there already stay."""
    commands = {"plain": "simulate", "weak": "noise", "noise": "noise", "secure": "secure"}
    for variant in plan.variants:
        name = f"{plan.name}-{variant}"
        if (out / f"{name}-truth").is_dir():
            continue
        rounds = min(plan.rounds, plan.secure_rounds) if variant == "secure" else plan.rounds
        told = {"images": IMAGES, "batch-size": plan.batch, "local-steps": plan.steps, "learning-rate": plan.rate}
        told |= {"noise": NOISE[variant], "bound": BOUND} if variant in NOISE else {}
        subprocess.run(
            [sys.executable, str(EXAMPLE / "run.py"), commands[variant], "--name", name, "--rounds", str(rounds),
             "--out", str(out), "--data", data, "--set", *(f"{key}={value}" for key, value in told.items())],
            check=True,
        )  # fmt: skip


def replayed(
    plan: Plan, out: Path, variants: Sequence[str], rounds: Sequence[int], evaluations: int, folder: str
) -> None:
    """Attacks trainings of one recipe and writes one report."""
    from medpfl.audit.replay import prepare_replay, replay
    from medpfl.federation.recording import read_recording
    from medpfl.report import write_report

    parts = []
    for variant in variants:
        name = f"{plan.name}-{variant}"
        recording = read_recording(out / name)
        parts.append(
            prepare_replay(
                name,
                recording,
                "brain.task:Net",
                attacks=searched(evaluations, plan.steps),
                recipe=plan.together if variant == "secure" else plan.recipe,
                defense=defense(variant),
                truth=out / f"{name}-truth",
                pool=out / f"{plan.name}-plain-pool",
                rounds=[number for number in rounds if number in recording.rounds],
                size=32,
                channels=1,
                search_path=(EXAMPLE,),
            )
        )
    summary = replay(parts, out / folder)
    print(f"{plan.name}: {summary.computed} cases computed, {write_report(out / folder)}", flush=True)


def seeds(plans: Sequence[Plan], out: Path, data: str, count: int) -> None:
    """Utility for more seeds; the first is compared with what Flower trained. What is there already stays."""
    path = out / "seeds.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    done = {(row["recipe"], row["variant"], row["seed"]) for row in rows}
    wanted = [(plan, variant, seed) for seed in range(count) for plan in plans for variant in plan.variants
              if variant != "secure" and (plan.name, variant, seed) not in done]  # fmt: skip
    for plan, variant, seed in wanted:
        history, final = _outside(plan, NOISE.get(variant, 0.0), data, seed)
        rows += [{"recipe": plan.name, "variant": variant, "seed": seed, **one} for one in history[-1:]]
        path.write_text(json.dumps(rows))
        if variant == "plain" and seed == 0 and (out / f"{plan.name}-plain").is_dir():
            print(f"{plan.name}: largest difference from Flower's weights {_apart(plan, out, final):.1e}", flush=True)


def _outside(plan: Plan, noise: float, data: str, seed: int) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """The same federated training in a loop: what the server judges after each round, and the last weights."""
    import torch
    from brain.task import client_images, held_out, initial_model, judge, round_images, train

    model, (images, labels) = initial_model(seed), held_out(data, seed)
    history = []
    torch.manual_seed(seed + 1000)
    for number in range(1, plan.rounds + 1):
        sent = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        mean = {name: torch.zeros_like(tensor) for name, tensor in sent.items()}
        for client in range(CLIENTS):
            model.load_state_dict(sent)
            own = client_images(data, client, IMAGES, seed)
            train(model, *round_images(*own, number, plan.batch * plan.steps), plan.batch, plan.rate)
            change = {name: tensor - sent[name] for name, tensor in model.state_dict().items()}
            if noise:
                norm = float(sum(one.square().sum() for one in change.values())) ** 0.5
                change = {
                    name: one * min(1.0, BOUND / norm) + noise * torch.randn(one.shape) for name, one in change.items()
                }
            for name, one in change.items():
                mean[name] += (sent[name] + one) / CLIENTS
        model.load_state_dict(mean)
        history.append({"round": number, **judge(model, images, labels)})
    return history, mean


def _apart(plan: Plan, out: Path, final: Mapping[str, Any]) -> float:
    """How far the loop's last weights lie from the mean of the updates that Flower's clients sent in the last round."""
    from medpfl.federation.recording import read_recording

    last = [
        update.tensors for update in read_recording(out / f"{plan.name}-plain").updates if update.round == plan.rounds
    ]
    return max(float((sum(one[name] for one in last) / len(last) - value).abs().max()) for name, value in final.items())


if __name__ == "__main__":
    raise SystemExit(main())

"""What a one-run audit shows of our own DP-SGD client: lower bounds on epsilon beside the promised one.

    python benchmarks/one_run_audit.py --canaries 512 --runs 8 --out docs/benchmarks

A client trains a linear model on canaries that do not disturb each other, each of which takes part by a fair coin. The
audit guesses the coins from the update. Beside the client as it is stand clients with defects that were seen in
libraries: a quarter of the noise, noise that is averaged over the batch like a gradient, and no clipping.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from medpfl.audit.canaries import audit_client, worst_case
from medpfl.core.domain import Tensors
from medpfl.core.recipes import Recipe
from medpfl.defenses import DPSGD


class QuarterOfTheNoise(DPSGD):
    """Adds a quarter of the noise that it promises."""

    def per_example(self, gradients: Tensors, recipe: Recipe, generator: torch.Generator) -> Tensors:
        """As DP-SGD with a quarter of the multiplier."""
        lower = DPSGD(bound=self.bound, noise_multiplier=self.noise_multiplier / 4)
        return lower.per_example(gradients, recipe, generator)


class AveragedNoise(DPSGD):
    """Draws its noise per image and takes the mean of that too."""

    def per_example(self, gradients: Tensors, recipe: Recipe, generator: torch.Generator) -> Tensors:
        """The clean mean, with noise that is too small by the square root of the batch size."""
        lower = DPSGD(bound=self.bound, noise_multiplier=self.noise_multiplier / recipe.batch_size**0.5)
        return lower.per_example(gradients, recipe, generator)


class NoClipping(DPSGD):
    """Adds its noise to gradients of any size."""

    def per_example(self, gradients: Tensors, recipe: Recipe, generator: torch.Generator) -> Tensors:
        """The mean of the gradients as they are, with the promised noise."""
        noise = DPSGD(bound=self.bound, noise_multiplier=self.noise_multiplier)
        empty = {name: gradient[:0] for name, gradient in gradients.items()}
        drawn = noise.per_example(empty, recipe, generator)
        return {name: gradient.sum(dim=0) / recipe.batch_size + drawn[name] for name, gradient in gradients.items()}


CLIENTS: Mapping[str, type[DPSGD]] = {
    "as it is": DPSGD,
    "a quarter of the noise": QuarterOfTheNoise,
    "noise averaged as well": AveragedNoise,
    "no clipping": NoClipping,
}


@dataclass(frozen=True)
class Row:
    """One client at one noise multiplier and number of steps."""

    client: str
    noise_multiplier: float
    steps: int
    promised: float
    general: float
    general_ceiling: float
    gaussian: float
    gaussian_ceiling: float
    canaries: int
    guesses: int
    right: int
    refuted: bool


def measure(canaries: int, runs: int) -> Iterator[Row]:
    """All rows: the client as it is over multipliers and steps, the defects at one."""
    model, batch = worst_case(canaries)
    settings = [("as it is", s, steps) for steps in (1, 8) for s in (0.5, 1.0, 2.0, 4.0)]
    settings += [(name, 2.0, 1) for name in CLIENTS if name != "as it is"]
    for name, multiplier, steps in settings:
        one = steps == 1
        recipe = Recipe() if one else Recipe(update="delta", epochs=steps, learning_rate=1e-3, precision="float64")
        found = audit_client(CLIENTS[name](noise_multiplier=multiplier), model, batch, recipe, runs=runs)
        yield Row(
            client=name,
            noise_multiplier=multiplier,
            steps=steps,
            promised=round(found.promised.epsilon, 3),
            general=round(found.general.epsilon, 3),
            general_ceiling=round(found.general.ceiling, 3),
            gaussian=round(found.gaussian.epsilon, 3),
            gaussian_ceiling=round(found.gaussian.ceiling, 3),
            canaries=found.general.canaries,
            guesses=found.general.guesses,
            right=found.general.right,
            refuted=found.broken,
        )


def write(rows: list[Row], folder: Path, seconds: float, command: str) -> None:
    """The table as CSV and Markdown."""
    with (folder / "one_run_audit.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    lines = [
        "# One-run audit of the DP-SGD client",
        "",
        f"    {command}",
        "",
        f"{rows[0].canaries} canaries, each in by a fair coin, delta 1e-5, 95% confidence, {seconds:.0f} s. `promised`: epsilon of one",
        "image in the round, by the accountant. Lower bounds: no client with a lower epsilon would let so many guesses be",
        "right, for any mechanism and for a Gaussian one; in brackets the ceiling, what as many guesses show if all are right.",
        "",
        "| client | noise multiplier | steps | promised | any mechanism | Gaussian | promise refuted |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.client} | {row.noise_multiplier:g} | {row.steps} | {row.promised:.2f} | {row.general:.2f} "
        f"({row.general_ceiling:.2f}) | {row.gaussian:.2f} ({row.gaussian_ceiling:.2f}) | {'yes' if row.refuted else 'no'} |"
        for row in rows
    ]
    lines += [
        "",
        "Canaries have one bright pixel each in a linear model without bias, so that their gradients are orthogonal and longer",
        "than any clipping norm. 300 images of noise in `lenet_dlg` have nearly the same gradient each: there as many guesses",
        "are right as a coin gets, and the audit shows nothing. An audit of this kind refutes a promise; it never proves one.",
        "",
    ]
    (folder / "one_run_audit.md").write_text("\n".join(lines))


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canaries", type=int, default=512, help="in each run")
    parser.add_argument(
        "--runs", type=int, default=8, help="runs with new coins, which count as one with more canaries"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()
    start = time.perf_counter()
    rows = list(measure(options.canaries, options.runs))
    command = f"python benchmarks/one_run_audit.py --canaries {options.canaries} --runs {options.runs}"
    write(rows, options.out, time.perf_counter() - start, command)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()

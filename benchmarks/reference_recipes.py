"""DLG and iDLG as their papers give them, one image at a time, beside MedPFL: quality against time.

    python benchmarks/reference_recipes.py --data brain_mri melanoma --victims 16 --out docs/benchmarks

The reference is the algorithm box in plain PyTorch: a normal dummy image (for DLG a normal dummy label too), moved by
`torch.optim.LBFGS` as it comes, called 300 times, in float32, on the sum of squared gradient differences. It stops
early where its loss is no longer finite. MedPFL attacks all victims side by side with its defaults, at growing numbers
of outer steps. Both sides meet the same nets, victims and gradients, and see nothing else. Seconds are process time of
the attack on one thread, per victim; PSNR is of the clamped image, of the last iterate for the reference.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from pictures import KINDS, ROOT, load_pictures
from torch import Tensor, nn

from medpfl.attacks import ATTACKS
from medpfl.core.domain import Batch, Observation, Recipe, Reconstruction
from medpfl.core.functional import psnr
from medpfl.core.seeding import generator
from medpfl.core.tasks import SingleLabel
from medpfl.data import Dataset
from medpfl.federation.client import client_step
from medpfl.metrics.statistics import success_rate
from medpfl.models import MODELS, prepare

SUCCESS = 35.0
"""Decibels above which an image counts as come back."""

CALLS = (10, 30, 100, 300)
"""Calls of `torch.optim.LBFGS` after which the reference is looked at; the papers make 300."""

OUTER_STEPS = (3, 6, 300)
"""Budgets of MedPFL, in outer steps of 20; 300 is its default, which no search here needs."""

COLUMNS = ("data", "net", "attack", "side", "budget", "victims", "share", "low", "high", "median_psnr", "seconds")

Row = dict[str, str | int | float]


@dataclass(frozen=True)
class Setting:
    """A plain net, and what the clients of that net hold and send."""

    net: nn.Module
    images: list[Tensor]
    observations: list[Observation]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every data set and attack, then writes the table and the figure."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    calls = [count for count in CALLS if count <= options.most_calls]
    rows: list[Row] = []
    for name in options.data:
        dataset, title = load_pictures(options.root, name, options.size)
        setting = make_setting(dataset, options.net, options.victims, options.first_seed)
        for attack in options.attacks:
            measured = {
                "reference": [
                    (count, *one) for count, one in zip(calls, references(setting, attack, calls), strict=True)
                ],
                "medpfl": [(steps, *ours(setting, attack, steps)) for steps in OUTER_STEPS],
            }
            for side, found in measured.items():
                for budget, values, seconds in found:
                    rows.append(row(title, options.net, attack, side, budget, values, seconds))
                    print(rows[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "reference_recipes.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (options.out / "reference_recipes.md").write_text(page(rows, options), encoding="utf-8")
    figure(rows, options.out / "reference_recipes.png")


def make_setting(dataset: Dataset, net_name: str, victims: int, seed: int) -> Setting:
    """One untrained net and the gradients that clients with one image each send."""
    shape, classes = tuple(dataset.images.shape[1:]), len(dataset.class_names)
    net = MODELS[net_name].item(shape, classes, generator("net", seed, net_name)).eval()
    model = prepare(net, name=net_name, image_shape=shape, task=SingleLabel(classes))
    order = torch.randperm(len(dataset.images), generator=generator("victims", seed, dataset.name))[:victims].tolist()
    observations = []
    for index in order:
        update, _ = client_step(model, Batch(dataset.images[[index]], dataset.targets[[index]]), Recipe())
        observations.append(Observation(model, update, Recipe(), "honest_server"))
    return Setting(net, [dataset.images[[index]] for index in order], observations)


def references(setting: Setting, attack: str, calls: Sequence[int]) -> list[tuple[list[float], float]]:
    """For every number of calls: PSNR of every victim, and seconds per victim."""
    by_victim = []
    for place, (image, observation) in enumerate(zip(setting.images, setting.observations, strict=True)):
        gradient = [observation.update.trainable[name] for name, _ in setting.net.named_parameters()]
        torch.manual_seed(place)
        by_victim.append(reference(setting.net, gradient, image, attack, calls))
    return [
        ([one[place][0] for one in by_victim], sum(one[place][1] for one in by_victim) / len(by_victim))
        for place in range(len(calls))
    ]


def reference(
    net: nn.Module, gradient: Sequence[Tensor], image: Tensor, attack: str, calls: Sequence[int]
) -> list[tuple[float, float]]:
    """PSNR and seconds after so many calls. image (1, C, *spatial): gives the shape, and is what the PSNR is against."""
    classes = len(gradient[-1])
    dummy = torch.randn_like(image).requires_grad_()
    variables = [dummy]
    target: Callable[[], Tensor]
    if attack == "dlg":
        logits = torch.randn(1, classes).requires_grad_()
        variables.append(logits)
        target = lambda: torch.softmax(logits, dim=-1)  # noqa: E731
    else:
        label = torch.argmin(gradient[-2].sum(dim=1)).reshape(1)
        target = lambda: torch.nn.functional.one_hot(label, classes).float()  # noqa: E731
    optimizer = torch.optim.LBFGS(variables)
    parameters = list(net.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -(target() * torch.log_softmax(net(dummy), dim=-1)).sum()
        candidate = torch.autograd.grad(loss, parameters, create_graph=True)
        distance = sum(((one - other) ** 2).sum() for one, other in zip(candidate, gradient, strict=True))
        assert isinstance(distance, Tensor)
        for variable, derivative in zip(variables, torch.autograd.grad(distance, variables), strict=True):
            variable.grad = derivative
        return distance.detach()

    found, seconds, finite = [], 0.0, True
    for count in range(1, calls[-1] + 1):
        if finite:
            start = time.process_time()
            finite = bool(torch.isfinite(optimizer.step(closure)))
            seconds += time.process_time() - start
        if count in calls:
            found.append((float(psnr(image.double(), dummy.detach().double().nan_to_num(0.5).clamp(0, 1))[0]), seconds))
    return found


def ours(setting: Setting, name: str, steps: int) -> tuple[list[float], float]:
    """PSNR of every victim, and seconds per victim."""
    attack = ATTACKS[name].item(iterations=steps)
    start = time.process_time()
    streams = [generator("attack", place) for place in range(len(setting.images))]
    results = attack.reconstruct(setting.observations, streams)
    seconds = (time.process_time() - start) / len(results)
    values = []
    for image, result in zip(setting.images, results, strict=True):
        found = isinstance(result, Reconstruction) and len(result.images) > 0
        values.append(float(psnr(image.double(), result.images.double())[0]) if found else 0.0)
    return values, seconds


def row(data: str, net: str, attack: str, side: str, budget: int, values: Sequence[float], seconds: float) -> Row:
    """One line: the share that came back with its interval, and the median."""
    share = success_rate([one > SUCCESS for one in values], range(len(values)), seed=0)
    low, high = (float("nan") if bound is None else bound for bound in (share.low, share.high))
    numbers = (share.mean, low, high, median(values), seconds)
    rounded = (*(round(one, 2) for one in numbers[:3]), round(numbers[3], 1), float(f"{numbers[4]:.2g}"))
    return dict(zip(COLUMNS, (data, net, attack, side, budget, len(values), *rounded), strict=True))


def page(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The table with what it means."""
    names = {"reference": "as published, one by one", "medpfl": "MedPFL"}
    lines = [
        "# The papers' own recipes, one image at a time\n",
        f"    python benchmarks/reference_recipes.py --data {' '.join(options.data)} --victims {options.victims} "
        f"--most-calls {options.most_calls} --net {options.net}\n",
        f"{options.size}x{options.size}, one image per update, plain gradient, no defense, an untrained `{options.net}`. "
        "Seconds are process time of one thread per victim. The reference calls `torch.optim.LBFGS` as it comes, in "
        "float32 (300 calls in the papers); steps of MedPFL are outer steps of 20, with its other defaults. The share "
        f"is of victims above {SUCCESS:.0f} dB.\n",
        "| data | attack | side | calls or steps | share [95 %] | median PSNR | s per victim |",
        "|" + " --- |" * 7,
    ]
    for one in rows:
        share = f"{one['share']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"
        lines.append(
            f"| {one['data']} | {one['attack']} | {names[str(one['side'])]} | {one['budget']} | {share} | "
            f"{one['median_psnr']} | {one['seconds']} |"
        )
    return "\n".join([*lines, "", "![Share of victims come back, against seconds](reference_recipes.png)", ""])


def figure(rows: Sequence[Row], path: Path) -> None:
    """Median PSNR and share come back against seconds per victim, one column per data set and attack."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    panels = list(dict.fromkeys((str(one["data"]), str(one["attack"])) for one in rows))
    drawing = Figure(figsize=(3.6 * len(panels), 5.6), layout="constrained")
    grid = drawing.subplots(2, len(panels), squeeze=False, sharex="col")
    for column, panel in enumerate(panels):
        for side, color, marker in (("reference", "#b3541e", "s"), ("medpfl", "#1f5fa8", "o")):
            chosen = [one for one in rows if (one["data"], one["attack"], one["side"]) == (*panel, side)]
            seconds = [float(one["seconds"]) for one in chosen]
            for line, value in enumerate(("median_psnr", "share")):
                heights = [float(one[value]) for one in chosen]
                label = {"reference": "as published, one by one", "medpfl": "MedPFL"}[side]
                grid[line][column].plot(seconds, heights, marker=marker, color=color, label=label)
        grid[0][column].set(title=" ".join(panel), ylabel="median PSNR, dB")
        grid[0][column].set_ylim(bottom=0.0)
        grid[1][column].set(
            xscale="log", xlabel="seconds per victim (one thread)", ylabel=f"share above {SUCCESS:.0f} dB"
        )
        grid[1][column].set_ylim(-0.05, 1.05)
        grid[1][column].xaxis.set_major_locator(FixedLocator([0.1, 0.3, 1, 3, 10, 30]))
        grid[1][column].xaxis.set_major_formatter("{x:g}")
        grid[1][column].xaxis.set_minor_locator(NullLocator())
        for axes in grid[:, column]:
            axes.grid(alpha=0.3)
    grid[1][0].legend(frameon=False, fontsize=8)
    drawing.savefig(path, dpi=110)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the data sets (MEDPFL_DATA)")
    parser.add_argument("--data", nargs="+", choices=list(KINDS), default=["brain_mri", "melanoma"])
    parser.add_argument("--net", default="lenet_dlg")
    parser.add_argument("--attacks", nargs="+", choices=["dlg", "idlg"], default=["dlg", "idlg"])
    parser.add_argument("--victims", type=int, default=16)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--most-calls", type=int, default=300, help="of the reference; 300 in the papers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "benchmarks")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

"""Table, CSV and figure of `flower_training.py`, from its trainings, replays and seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
from tables import markdown, put, write_texts

from medpfl.metrics.statistics import bootstrap_mean, paired_difference

WORDS = {"plain": "plain", "weak": "noise of 0.001", "noise": "noise of 0.01", "secure": "SecAgg+"}
STYLES = {
    "idlg": ("#0b3c8c", "o"),
    "gradinv": ("#b3420b", "s"),
    "fedavg_inversion": ("#00695c", "^"),
    "maximum_a_posteriori": ("#8e1560", "D"),
}
LEAKAGE = (
    "recipe", "training", "round", "attack", "knows_defense", "victims", "images", "failed", "ssim", "ssim_low", "ssim_high",
    "null_ssim", "psnr", "psnr_low", "psnr_high", "null_psnr", "asr", "null_asr", "gradients",
)  # fmt: skip


class Plan(Protocol):
    """What the page needs of a plan."""

    @property
    def name(self) -> str: ...
    @property
    def words(self) -> str: ...
    @property
    def variants(self) -> tuple[str, ...]: ...


class Utility(NamedTuple):
    """One training of one seed, by round."""

    recipe: str
    variant: str
    rounds: list[int]
    accuracy: list[float]
    auc: list[float]


def write_page(plans: Sequence[Plan], out: Path, page: Path) -> None:
    """Puts the tables into the page and writes CSV and figure beside it."""
    leakage = [row for plan in plans for row in _leakage(plan, out / f"{plan.name}-replay")]
    longer = [row for plan in plans for row in _leakage(plan, out / f"{plan.name}-longer")]
    write_texts(page.with_suffix(".csv"), LEAKAGE, [*leakage, *longer])
    put(page, "longer", _leakage_table(plans, longer))
    first = [_trained(plan, variant, out) for plan in plans for variant in plan.variants]
    put(page, "leakage", _leakage_table(plans, leakage))
    put(page, "utility", _utility_table(plans, first, _seeds(out)))
    _draw(plans, leakage, first, page.with_suffix(".png"))


def _leakage(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    if not (folder / "cells.csv").exists():
        return []
    cells = pd.read_csv(folder / "cells.csv")
    results = pd.read_csv(folder / "results.csv").drop_duplicates("case")
    spent = results.groupby("cell")["gradient_evaluations"].mean()
    return [
        {
            "recipe": plan.name,
            "training": cell["dataset"].rpartition("-")[2],
            "round": json.loads(cell["model_params"])["round"],
            "attack": cell["attack"],
            "knows_defense": str(cell["adaptive"]).lower(),
            **{name: _text(cell[name], 0) for name in ("victims", "images", "failed")},
            **{name: _text(cell[column], 3) for name, column in {
                "ssim": "ssim_mean", "ssim_low": "ssim_low", "ssim_high": "ssim_high", "null_ssim": "null_nearest_ssim",
                "asr": "asr", "null_asr": "null_nearest_asr",
            }.items()},
            **{name: _text(cell[column], 1) for name, column in {
                "psnr": "psnr_mean", "psnr_low": "psnr_low", "psnr_high": "psnr_high", "null_psnr": "null_nearest_psnr",
            }.items()},
            "gradients": _text(spent.get(cell["cell"]), 0),
        }
        for _, cell in cells.iterrows()
        if cell["status"] == "done" and cell["done"] > 0
    ]  # fmt: skip


def _text(value: Any, digits: int) -> str:
    return "" if value is None or value != value else f"{float(value):.{digits}f}"


def _trained(plan: Plan, variant: str, out: Path) -> Utility:
    history = json.loads((out / f"{plan.name}-{variant}.utility.json").read_text())
    return Utility(
        plan.name, variant, *([one[key] for one in history] for key in ("round", "balanced_accuracy", "auc"))
    )


def _seeds(out: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """By recipe and variant, what the last round of each seed reached, where there are several seeds."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    path = out / "seeds.json"
    for row in json.loads(path.read_text()) if path.exists() else []:
        found.setdefault((row["recipe"], row["variant"]), {})[row["seed"]] = row
    return {key: [own[seed] for seed in sorted(own)] for key, own in found.items() if len(own) > 1}


def _leakage_table(plans: Sequence[Plan], rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each attack on each training: mean SSIM with its interval and the share reconstructed, by round."""
    words = {plan.name: plan.words for plan in plans}
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        told = " (told)" if row["knows_defense"] == "true" else ""
        groups.setdefault((row["recipe"], row["training"], row["attack"] + told), []).append(row)
    lines: list[list[object]] = []
    for (recipe, training, attack), own in groups.items():
        if not lines or lines[-1][:2] != [words[recipe], WORDS[training]]:
            nulls = [f"{row['round']}: {_two(row['null_ssim'])}, {row['null_psnr']} dB" for row in own]
            lines.append([words[recipe], WORDS[training], "(most similar other image)", *_four(nulls), None])
        found = [
            f"{row['round']}: {_two(row['ssim'])}{_span(row)}, {row['psnr']} dB, **{_percent(row['asr'])}**"
            for row in own
        ]
        lines.append(
            [words[recipe], WORDS[training], attack, *_four(found), ", ".join(row["gradients"] for row in own)]
        )
    head = ["client", "training", "attack", "first round", "", "", "last round", "gradients for each client"]
    return markdown(head, lines)


def _four(texts: Sequence[str]) -> list[str | None]:
    return [*texts, *[None] * (4 - len(texts))]


def _two(text: str) -> str:
    return f"{float(text):.2f}" if text else ""


def _percent(text: str) -> str:
    return f"{float(text):.0%}"


def _span(row: dict[str, Any]) -> str:
    return f" [{_two(row['ssim_low'])}, {_two(row['ssim_high'])}]" if row["ssim_low"] else ""


def _utility_table(
    plans: Sequence[Plan], first: Sequence[Utility], seeds: dict[tuple[str, str], list[dict[str, Any]]]
) -> list[str]:
    head = ["client", "training", "rounds", "Flower, seed 0: balanced accuracy first, middle, last", "AUC", "seeds outside",
            "balanced accuracy [95 %]", "AUC [95 %]", "minus plain, AUC"]  # fmt: skip
    lines = []
    for plan in plans:
        for one in (found for found in first if found.recipe == plan.name):
            own = seeds.get((plan.name, one.variant), [])
            places = [0, len(one.rounds) // 2, -1]
            cost: object = None
            if own and one.variant not in ("plain", "secure"):
                before = {row["seed"]: row["auc"] for row in seeds[plan.name, "plain"]}
                common = [row for row in own if row["seed"] in before]
                found = paired_difference(
                    [row["auc"] for row in common],
                    [before[row["seed"]] for row in common],
                    [str(row["seed"]) for row in common],
                    seed=0,
                )
                cost = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
            lines.append([
                plan.words, WORDS[one.variant], one.rounds[-1],
                ", ".join(f"{one.accuracy[place]:.2f}" for place in places), ", ".join(f"{one.auc[place]:.2f}" for place in places),
                len(own) or None, *(_mean([row[key] for row in own]) for key in ("balanced_accuracy", "auc")), cost,
            ])  # fmt: skip
    return markdown(head, lines)


def _mean(values: Sequence[float]) -> str | None:
    if not values:
        return None
    found = bootstrap_mean(np.asarray(values), list(range(len(values))), seed=0)
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _draw(plans: Sequence[Plan], rows: Sequence[dict[str, Any]], first: Sequence[Utility], path: Path) -> None:
    """Rows are clients; columns the trainings, and what the model was worth."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    columns = ("plain", "weak", "noise", "secure")
    figure, grid = plt.subplots(
        len(plans), len(columns) + 1, figsize=(15.5, 3.1 * len(plans) + 0.8), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for place, plan in enumerate(plans):
        for axes, variant in zip(grid[place], columns, strict=False):
            own = [row for row in rows if row["recipe"] == plan.name and row["training"] == variant]
            handles |= _leak(axes, own)
            axes.set(ylim=(-0.02, 1.02), title=WORDS[variant] if own else "")
            axes.title.set_size(10.5)
            if not own:
                axes.axis("off")
        grid[place][0].set_ylabel("\n".join([*wrap(plan.words, 24), "mean SSIM"]))
        _worth(grid[place][4], [one for one in first if one.recipe == plan.name])
    for axes in grid[-1]:
        axes.set_xlabel("round")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _leak(axes: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    handles = {}
    rounds = sorted({row["round"] for row in rows})
    for index, attack in enumerate(name for name in STYLES if any(row["attack"] == name for row in rows)):
        color, marker = STYLES[attack]
        own = sorted((row for row in rows if row["attack"] == attack), key=lambda row: row["round"])
        x = [rounds.index(row["round"]) + 0.16 * (index - 1) for row in own]
        (handles[attack],) = axes.plot(x, [float(row["ssim"]) for row in own], color=color, marker=marker, markersize=5)
        for at, row in zip(x, own, strict=True):
            if row["ssim_low"]:
                axes.plot([at, at], [float(row["ssim_low"]), float(row["ssim_high"])], color=color, linewidth=1)
    nulls = {row["round"]: float(row["null_ssim"]) for row in rows if row["null_ssim"]}
    if nulls:
        (handles["most similar other image"],) = axes.plot(
            [rounds.index(number) for number in sorted(nulls)], [nulls[number] for number in sorted(nulls)],
            color="#555555", linestyle="--",
        )  # fmt: skip
    axes.set_xticks(range(len(rounds)), rounds)
    return handles


def _worth(axes: Any, trained: Sequence[Utility]) -> None:
    dashes = {"plain": "-", "weak": "-.", "noise": "--", "secure": ":"}
    for one in trained:
        axes.plot(one.rounds, one.auc, color="#333333", linestyle=dashes[one.variant], label=WORDS[one.variant])
    axes.set(ylim=(-0.02, 1.02), title="held-out AUC")
    axes.title.set_size(10.5)
    axes.legend(frameon=False, loc="lower right", fontsize=9.5)


if __name__ == "__main__":
    raise SystemExit("run flower_training.py page")

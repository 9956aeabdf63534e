"""Which noise does knowing it, and what images look like, buy? Published matching searched longer and otherwise.

    .venv/bin/python benchmarks/noise_bought.py --csv docs/benchmarks/noise_bought.csv --table docs/benchmarks/noise_bought.md

The victims, nets and noise of `known_noise.py`. Squared differences of gradients are matched without a prior and without
knowing the noise, by Adam and by L-BFGS, at less and less noise, with so many gradient evaluations. The noise
at which their median is that of the attacker who knows (`docs/benchmarks/known_noise.csv`) is interpolated.
`--development` attacks other victims: settings were chosen on them. Rows that the CSV file has are not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from known_noise import Setting, attacked, make_setting
from noise_bought_page import table
from pictures import KINDS, ROOT
from tables import add_texts, has_texts, read_texts

from medpfl.attacks.base import Attack
from medpfl.attacks.cpl import CPL
from medpfl.attacks.gradinv import GradInv
from medpfl.attacks.idlg import IDLG


def _adam(budget: int, **other: Any) -> Attack:
    settings = {"learning_rate": 0.05, "total_variation": 0.0, "patience": 0, "signed": False, **other}
    return GradInv(distance="l2", iterations=budget - 1, **settings)


def _lbfgs(budget: int, kind: type[IDLG | CPL] = IDLG, **other: Any) -> Attack:
    """Wolfe's line search may try a quarter of the steps in vain."""
    settings = {"patience": 1_000_000, "restarts": 1, "tolerance": 0.0, "output_error": "candidate", **other}
    steps = int(budget / settings["restarts"] / 1.25) - 1
    return kind(iterations=steps, inner_iterations=1, **settings)


SIDES: dict[str, Callable[[int], Attack]] = {
    "adam 0.02": lambda budget: _adam(budget, learning_rate=0.02),
    "adam 0.05": _adam,
    "adam 0.1": lambda budget: _adam(budget, learning_rate=0.1),
    "lbfgs normal": _lbfgs,
    "lbfgs tiled": lambda budget: _lbfgs(budget, CPL),
    "lbfgs unit steps": lambda budget: _lbfgs(budget, line_search="none"),
    "lbfgs armijo": lambda budget: _lbfgs(budget, line_search="armijo"),
    "lbfgs 4 starts": lambda budget: _lbfgs(budget, restarts=4),
    "lbfgs tiled 4 starts": lambda budget: _lbfgs(budget, CPL, restarts=4),
}
"""Searches of the published distance, for a budget of gradient evaluations."""

COLUMNS = ("data", "part", "scale", "side", "budget", "victim", "psnr", "ssim", "evaluations", "seconds")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the CSV file lacks, then writes the table."""
    options = _options(arguments)
    torch.set_num_threads(1)
    part = "development" if options.development else "test"
    for data in options.data:
        for scale in options.scales:
            for side in options.sides:
                for budget in options.evaluations:
                    key = {"data": data, "part": part, "scale": scale, "side": side, "budget": budget}
                    if has_texts(options.csv, key):
                        continue
                    setting = _untold(make_setting(options.root, data, scale, options.victims, options.development))
                    rows = attacked(SIDES[side](budget), "published", setting, budget)
                    found = add_texts(options.csv, COLUMNS, [key | dict(one) for one in rows])
                    middle = sorted(float(one["psnr"]) for one in found)[len(found) // 2]
                    print(key, round(middle, 2), found[0]["seconds"][:5], flush=True)
    if options.table:
        options.table.write_text(table(read_texts(options.csv), read_texts(options.known)), encoding="utf-8")


def _untold(setting: Setting) -> Setting:
    """The observations without any knowledge."""
    unknown = [replace(one, knowledge=type(one.knowledge)()) for one in setting.observations]
    return replace(setting, observations=unknown)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the data sets (MEDPFL_DATA)")
    parser.add_argument("--data", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--scales", nargs="+", type=float, default=[0.01, 0.003, 1e-3, 3e-4, 1e-4], help="of the noise")
    parser.add_argument("--sides", nargs="*", choices=list(SIDES), default=["adam 0.05", "lbfgs tiled"])
    parser.add_argument("--evaluations", nargs="+", type=int, default=[300], help="per victim")
    parser.add_argument("--victims", type=int, default=16)
    parser.add_argument("--development", action="store_true", help="other victims, to choose settings on")
    parser.add_argument("--csv", type=Path, required=True, help="measured rows, kept and added to")
    parser.add_argument("--known", type=Path, default=Path("docs/benchmarks/known_noise.csv"), help="who knows")
    parser.add_argument("--table", type=Path, help="Markdown page to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

"""Every registered defense at a default strength against a naive attacker and one who knows it, at equal budgets.

    .venv/bin/python benchmarks/defense_matrix.py --data brain_mri --victims 4 --out out/defense_matrix \
        --table docs/benchmarks/defense_matrix.md

One audit: LeNet of DLG, untrained, one gradient of one image. Both attackers own no labels and have so many gradient
evaluations. Naive: GradInv. Adaptive: the defense's own `adaptive_attack`, which is told the mechanism; and maximum a
posteriori with a covariance learnt from auxiliary images, also told. Defenses appear as they are registered. The audit
resumes where it was stopped; `spec.yaml` in the output folder is the same as an audit spec.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pictures import KINDS, ROOT
from pydantic import ValidationError

from medpfl.attacks import ATTACKS
from medpfl.audit import run_audit
from medpfl.audit.spec import parse_spec
from medpfl.core.errors import InputError
from medpfl.defenses import DEFENSES

STRENGTHS: dict[str, dict[str, Any]] = {}
"""Settings of defenses in place of their defaults."""

INTRO = (
    "`lenet_dlg`, untrained, a net per victim, 32x32, one gradient of one image (of two for what",
    "mixes images); every registered defense at its defaults.",
    "Naive: GradInv. Adaptive: the attack that the defense names as the one that knows it. Learnt: maximum a posteriori with",
    "a covariance learnt from the pool's auxiliary images. The last two are told the mechanism. Few victims and few",
    "evaluations: read the intervals. An attacker below the null baselines failed, which is no merit of the defense.\n",
    "What it shows: against who knows the mechanism and what such images look like, `clip`, `delta_bound`, `group_norm`, `share`,",
    "`quantize` and `soteria` leave as much as no defense (12 to 14 dB above an unrelated picture, where GradInv against Soteria is 12",
    "to 14 dB below one), `top_k`, `prune`, `low_rank`, `random_k` and `lora` 6 to 10 dB, noise without clipping 3 to 6. A known `ats` policy",
    "is undone (3 to 4.5). At the null stand `dp_sgd`, `fed_cdp`, `fed_sdp`, `model_cloaking`, `local_dp`, `precode` and nearly `sign`. Against",
    "`censor`, `mixup` and `instahide` every attacker failed, which proves nothing.\n",
    "    python benchmarks/defense_matrix.py --victims 8 --evaluations 100 --out out/matrix \\\n"
    "        --csv docs/benchmarks/defense_matrix.csv --table docs/benchmarks/defense_matrix.md\n",
)

COLUMNS = (
    "defense",
    "attacker",
    "data",
    "status",
    "victims",
    "psnr",
    "ssim",
    "gain",
    "gain_low",
    "gain_high",
    "reason",
)


MIXING = ("instahide", "mixup")
"""Defenses that need two images in a batch."""


def spec_of(data: Sequence[str], root: Path, victims: int, evaluations: int, names: Sequence[str]) -> dict[str, Any]:
    """The audit's spec as plain values: those of the named defenses that can be made from their defaults."""
    defenses, attacks = [], [_budgeted({"name": "gradinv", "label": "naive"}, evaluations)]
    attacks.append(_budgeted({"name": "maximum_a_posteriori", "label": "learnt"}, evaluations))
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name in names:
        settings = STRENGTHS.get(name, {})
        try:
            defense = DEFENSES[name].item(**settings)
        except (ValidationError, InputError, TypeError):
            continue
        defenses.append({"name": name, **settings})
        if defense.adaptive_attack:
            attack = dict(defense.adaptive_attack)
            groups.setdefault(repr(attack), (attack, []))[1].append(name)
    for number, (attack, names) in enumerate(groups.values()):
        label = {"label": f"adaptive-{number}-{attack['name']}", "only": {"defense": names}}
        attacks.append(_budgeted({**attack, **label}, evaluations))
    made = [one["name"] for one in defenses]
    recipes: list[dict[str, Any]] = [
        {"update": "gradient", "only": {"defense": [name for name in made if name not in MIXING]}},
        {"update": "gradient", "batch_size": 2, "only": {"defense": [name for name in made if name in MIXING]}},
    ]
    return {
        "name": "defense-matrix",
        "data": [_entry(name, root, victims) for name in data],
        "models": [{"name": "lenet_dlg", "state": "untrained_per_victim"}],
        "threat_models": [{"name": "honest_server", "knows": ["defense", "auxiliary"]}],
        "recipes": [recipe for recipe in recipes if recipe["only"]["defense"]],
        "defenses": defenses,
        "attacks": attacks,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is left of the audit, then writes the table."""
    options = _options(arguments)
    names = [name for name in DEFENSES.names() if name in (options.defenses or DEFENSES.names())]
    plain = spec_of(options.data, options.root, options.victims, options.evaluations, names)
    run_audit(parse_spec(plain, base=Path.cwd()), options.out, workers=options.workers)
    rows = matrix(options.out / "cells.csv", options.victims)
    if options.defenses and options.csv and options.csv.is_file():
        rows = merged(options.csv, rows)
    if options.csv:
        with options.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    if options.table:
        options.table.write_text(table(rows, options), encoding="utf-8")


def merged(path: Path, rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The file's rows, with those that were measured now in their place."""
    with path.open(encoding="utf-8", newline="") as file:
        found = {(row["defense"], row["attacker"], row["data"]): dict(row) for row in csv.DictReader(file)}
    found |= {(row["defense"], row["attacker"], row["data"]): row for row in rows}
    return list(found.values())


def matrix(cells: Path, victims: int) -> list[dict[str, str]]:
    """A row for every defense, attacker and data set."""
    with cells.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    rows = []
    for cell in found:
        attacker = cell["attack"].partition("-")[0]
        row = {"defense": cell["defense"], "attacker": attacker, "data": cell["dataset"], "status": cell["status"]}
        row |= {
            "victims": str(victims),
            "psnr": cell["psnr_mean"],
            "ssim": cell["ssim_mean"],
            "gain": cell["gain_psnr"],
            "gain_low": cell["gain_psnr_low"],
            "gain_high": cell["gain_psnr_high"],
            "reason": cell["reason"],
        }
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, str]], options: argparse.Namespace) -> str:
    """Markdown: mean PSNR, and in brackets the gain over the best null baseline."""
    data = list(dict.fromkeys(row["data"] for row in rows))
    heads = [f"{one}: {who}" for one in data for who in ("naive", "adaptive", "learnt")]
    lines = ["# Defenses against naive and informed attackers\n", *INTRO]
    lines.append(
        f"{options.victims} victims, {options.evaluations} gradient evaluations; mean PSNR in dB, and the mean gain over the"
    )
    lines.append(
        "best null baseline with its 95 % interval over victims. Empty cells were not measured, or the defense needs no\n"
        "such attacker.\n"
    )
    lines += ["| defense | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for defense in dict.fromkeys(row["defense"] for row in rows):
        cells = []
        for one in data:
            for who in ("naive", "adaptive", "learnt"):
                same = [row for row in rows if (row["defense"], row["data"], row["attacker"]) == (defense, one, who)]
                cells.append(_shown(same[0]) if same else "")
        lines.append(f"| {defense} | " + " | ".join(cells) + " |")
    reasons = {(row["defense"], row["attacker"], row["reason"]) for row in rows if row["status"] == "refused"}
    lines += ["", *(f"- {defense}, {who}: refused, {reason}" for defense, who, reason in sorted(reasons))]
    return "\n".join(lines) + "\n"


def _shown(row: dict[str, str]) -> str:
    if not row["psnr"]:
        return row["status"]
    if not row["gain"]:
        return f"{float(row['psnr']):.1f}"
    return f"{float(row['psnr']):.1f}: {float(row['gain']):+.1f} [{float(row['gain_low']):+.1f}, {float(row['gain_high']):+.1f}]"


def _entry(name: str, root: Path, victims: int) -> dict[str, Any]:
    kind, channels = KINDS[name]
    entry: dict[str, Any] = {"name": name, "size": 32, "channels": channels, "victims": victims, "aspect": "squash"}
    if (root / name).is_dir():
        return {**entry, "reader": "folder", "path": str(root / name)}
    return {**entry, "reader": "phantom", "kind": kind, "count": 64}


def _budgeted(entry: dict[str, Any], evaluations: int) -> dict[str, Any]:
    """The entry with as many iterations as the budget allows, where the attack has iterations."""
    kind: Any = ATTACKS[entry["name"]].item
    names = {field.name for field in fields(kind)}
    own: dict[str, Any] = {"labels": "inferred"} if "labels" in names else {}
    if "inner_iterations" in names:
        own |= {"iterations": max(1, evaluations // 25), "restarts": 1}
    elif "iterations" in names:
        own |= {
            "iterations": int(evaluations / 1.25) - 1 if entry["name"] == "maximum_a_posteriori" else evaluations - 1
        }
    return {**own, **entry}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the data sets (MEDPFL_DATA)")
    parser.add_argument("--data", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--defenses", nargs="+", choices=DEFENSES.names(), help="these alone; the CSV keeps the others")
    parser.add_argument("--victims", type=int, default=4)
    parser.add_argument("--evaluations", type=int, default=200, help="gradient evaluations of each attacker")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of the audit, resumed where it was stopped")
    parser.add_argument("--csv", type=Path, help="rows to write")
    parser.add_argument("--table", type=Path, help="Markdown table to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

"""`medpfl vet FILE`: looks at a model that came from a server, before any training on it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from medpfl.cli.texts import printable, wide_console
from medpfl.core.domain import Tensors
from medpfl.guards.vetting import CHECKS, Vetting, check_tensors
from medpfl.guards.vetting import vet as vetted
from medpfl.models.state import read_tensors

EXIT_FOUND = 1

VERDICTS = {
    "passed": "passed: nothing was found",
    "leaks": "leaks: updates of this model give single images away, honest or not",
    "crafted": "crafted: the model has what honest training does not make; do not train on it",
}


def register(app: typer.Typer) -> None:
    """Adds `vet`."""
    app.command("vet")(vet)


def vet(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="checkpoint: PyTorch state dict, safetensors or npz", show_default=False),
    ],
    reference: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a checkpoint that was trusted, such as the round before's")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="write JSON to standard output instead of text")] = False,
) -> None:
    """Look at a model that came from a server before training on it; runs no code from the file.

    Exit codes: 0 passed, 1 something was found (do not train on it before you know why), 2 input error.

    \b
    Examples:
      medpfl vet round7.pt --reference round6.pt
      medpfl vet round7.safetensors --json
    """
    found = vetted(_read(file), None if reference is None else _read(reference))
    if as_json:
        typer.echo(json.dumps(as_plain(file, found), indent=2, ensure_ascii=False))
    else:
        _print(file, found)
    raise typer.Exit(0 if found.passed else EXIT_FOUND)


def _read(file: Path) -> Tensors:
    tensors = read_tensors(file)
    check_tensors(tensors, f"checkpoint '{file}'")
    return tensors


def as_plain(file: Path, found: Vetting) -> dict[str, Any]:
    """The vetting as JSON-like values; a score that was not measured is null."""
    checks = [{**asdict(result), "score": _finite(result.score)} for result in found.results]
    return {
        "file": str(file),
        "verdict": found.verdict,
        "behavior_checked": found.behavior_checked,
        "reasons": list(found.reasons),
        "checks": checks,
        "not_covered": list(found.not_covered),
    }


def _finite(score: float) -> float | None:
    return score if math.isfinite(score) else None


def _print(file: Path, found: Vetting) -> None:
    console = wide_console()
    table = Table("check", "looks for", "result", "score", "limit", "seen", box=box.SIMPLE_HEAD, pad_edge=False)
    for result in found.results:
        measured = result.status != "not checked"
        place = f"{result.where}: " if result.where else ""
        table.add_row(
            Text(result.check, no_wrap=True),
            result.means,
            Text(result.status, style="bold" if result.status == "found" else ""),
            f"{result.score:.3g}" if measured else "-",
            f"{result.threshold:g}",
            Text(printable(f"{place}{result.sentence}" if result.status != "clear" else CHECKS[result.check].summary)),
        )
    console.print(table)
    console.print(Text(f"{printable(str(file))}: {VERDICTS[found.verdict]}", style="bold"), soft_wrap=True)
    for reason in found.reasons:
        console.print(Text(f"  {printable(reason)}"), soft_wrap=True)
    if not found.behavior_checked:
        console.print(
            "Behavior was not checked: only tensors were looked at, which a careful attacker disguises.",
            soft_wrap=True,
        )
    console.print("\nNot covered:")
    for text in found.not_covered:
        console.print(Text(f"  {text}"), soft_wrap=True)

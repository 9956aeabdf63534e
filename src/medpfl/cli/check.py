"""`medpfl check SPEC`: what an audit would run, what it refuses, and what it would take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from medpfl.cli.texts import duration, wide_console

SpecPath = Annotated[Path, typer.Argument(help="the audit spec, YAML", show_default=False)]


def register(app: typer.Typer) -> None:
    """Adds `check`."""
    app.command("check")(check)


def check(
    spec: SpecPath,
    diagnose: Annotated[bool, typer.Option("--diagnose", help="with the cells of `medpfl audit --diagnose`")] = False,
    utility: Annotated[
        bool, typer.Option("--utility", help="with the federations of `medpfl audit --utility`")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
) -> None:
    """Validates a spec, shows its cells with the refused ones, estimates time and memory; runs no attack.

    Example: medpfl check audit.yaml --diagnose
    """
    import tempfile

    from medpfl.audit import load_spec
    from medpfl.audit.context import describe
    from medpfl.audit.estimate import estimate, training_seconds
    from medpfl.audit.plan import make_plan
    from medpfl.audit.preparation import prepare
    from medpfl.audit.runner import default_workers
    from medpfl.audit.utility import unique_runs
    from medpfl.audit.utility_estimate import utility_seconds

    console = wide_console()
    loaded = load_spec(spec)
    if diagnose:
        loaded = loaded.diagnosed()
    if utility:
        loaded = loaded.with_utility()
    with tempfile.TemporaryDirectory() as cache:
        plan = make_plan(loaded)
        prepared = prepare(loaded, Path(cache), plan)
        context = describe(loaded, prepared.cells, prepared.materials)
        estimates = {found.cell.id: found for found in estimate(prepared)}
        training = training_seconds(prepared)
        pricing = utility_seconds(prepared)
        federations = len(unique_runs(prepared.utility))
    workers = default_workers(plan, prepared.round_sizes)
    total = (sum(found.seconds for found in estimates.values()) + pricing) / workers + training
    own = len(prepared.cells)
    if as_json:
        rows = [
            {
                "cell": cell.id,
                "refused": prepared.refusals.get(cell.id),
                "cases": estimates[cell.id].cases if cell.id in estimates else 0,
                "seconds": estimates[cell.id].seconds if cell.id in estimates else 0.0,
                "memory_bytes": estimates[cell.id].memory if cell.id in estimates else 0.0,
            }
            for cell in prepared.all_cells
        ]
        extra = {"diagnosis": rows[own:]} if loaded.diagnose is not None else {}
        times = {"seconds": total, "training_seconds": training, "utility_seconds": pricing, "workers": workers}
        typer.echo(json.dumps({"cells": rows[:own], **extra, **times, **context}))
        return
    table = Table("cell", "cases", "at most", "memory", "refused because")
    for place, cell in enumerate(prepared.all_cells):
        if place == own:
            table.add_section()
        found = estimates.get(cell.id)
        name = ", ".join(dict.fromkeys(change.name for change in prepared.changes if change.cell.id == cell.id))
        name = cell.id if place < own else f"diagnosis, {name}: {cell.id}"
        if found is None:
            table.add_row(name, "-", "-", "-", prepared.refusals[cell.id])
        else:
            table.add_row(name, str(found.cases), duration(found.seconds), f"{found.memory / 2**20:.0f} MiB", "")
    console.print(table)
    for line in context["data"]:
        console.print(
            f"{line['dataset']}: {line['images']} images, {line['victims']} victims, "
            f"{line['bystanders']} bystanders, pool {line['training']} training, "
            f"{line['auxiliary']} auxiliary, {line['null']} null; left out: {line['near_duplicates']} near duplicates, "
            f"{line['dropped_by_patient']} of the victims' patients",
            markup=False,
        )
        for note in line["notes"]:
            console.print(f"  {note}", markup=False)
    for finding in context["findings"]:
        console.print(f"{finding['severity']}: {finding['model']}: {finding['message']}", markup=False)
    for warning in context["warnings"]:
        console.print(f"warning: {warning['defense']}: {warning['text']}", markup=False)
    console.print(
        f"{own} cells, {sum(cell.id in prepared.refusals for cell in prepared.cells)} refused"
        + (f", and {len(prepared.all_cells) - own} to diagnose them" if loaded.diagnose is not None else "")
        + f"; at most about {duration(total)} on {workers} workers"
        + (f", {duration(training)} of it for training models" if training else "")
        + (
            f", {duration(pricing / workers)} of it for {federations} federations that measure utility"
            if federations
            else ""
        )
        + f". On {plan.device}, where each worker computes as many candidates at once as fit {plan.memory / 2**20:.0f} MiB. "
        "Memory is of one candidate of a search, or of one round with a crafted model"
    )

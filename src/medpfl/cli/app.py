"""The command line: `medpfl`."""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from medpfl.cli import compare, export, init, listing, show
from medpfl.core.errors import InputError, Interrupted

EXIT_INPUT = 2
EXIT_FAILED_CASES = 3
EXIT_FAIL_IF = 4
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="medpfl",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Shows what can be reconstructed of patients' images from the updates of a federated model.\n\n"
    "Start with `medpfl demo`, or with `medpfl init`, `medpfl check audit.yaml` and `medpfl audit audit.yaml --out out`.",
)
_OUT = Console()
if not _OUT.is_terminal:
    _OUT = Console(width=160)  # a pipe or a log has no width of its own
_ERR = Console(stderr=True)

SpecPath = Annotated[Path, typer.Argument(help="the audit spec, YAML", show_default=False)]
Folder = Annotated[Path, typer.Argument(help="an audit's output folder", show_default=False)]
Workers = Annotated[int | None, typer.Option(min=0, help="worker processes; default one per core; 0: none")]


class _Bar:
    """Progress with the time left and the failures so far, on stderr."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[cases]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=_ERR,
        )
        self._task = self.progress.add_task("auditing", total=None, cases="")

    def update(self, done: float, total: int, failed: int) -> None:
        """Shows how far the audit is."""
        failures = f", {failed} failed" if failed else ""
        self.progress.update(
            self._task, completed=done, total=max(total, 1), cases=f"{int(done)}/{total} cases{failures}"
        )


@app.command()
def check(
    spec: SpecPath,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
) -> None:
    """Validates a spec, shows its cells with the refused ones, estimates time and memory; runs no attack.

    Example: medpfl check audit.yaml
    """
    import tempfile

    from medpfl.audit import load_spec
    from medpfl.audit.context import describe
    from medpfl.audit.estimate import estimate
    from medpfl.audit.plan import Plan
    from medpfl.audit.preparation import prepare
    from medpfl.audit.runner import default_workers

    loaded = load_spec(spec)
    with tempfile.TemporaryDirectory() as cache:
        prepared = prepare(loaded, Path(cache), Plan())
        context = describe(loaded, prepared.cells, prepared.materials)
        estimates = {found.cell.id: found for found in estimate(prepared)}
    workers = default_workers()
    total = sum(found.seconds for found in estimates.values()) / workers
    if as_json:
        rows = [
            {
                "cell": cell.id,
                "refused": prepared.refusals.get(cell.id),
                "cases": estimates[cell.id].cases if cell.id in estimates else 0,
                "seconds": estimates[cell.id].seconds if cell.id in estimates else 0.0,
            }
            for cell in prepared.cells
        ]
        typer.echo(json.dumps({"cells": rows, "seconds": total, "workers": workers, **context}))
        return
    table = Table("cell", "cases", "at most", "memory", "refused because")
    for cell in prepared.cells:
        found = estimates.get(cell.id)
        if found is None:
            table.add_row(cell.id, "-", "-", "-", prepared.refusals[cell.id])
        else:
            table.add_row(cell.id, str(found.cases), _duration(found.seconds), f"{found.memory / 2**20:.0f} MiB", "")
    _OUT.print(table)
    for line in context["data"]:
        _OUT.print(
            f"{line['dataset']}: {line['images']} images, {line['victims']} victims, pool {line['training']} training, "
            f"{line['auxiliary']} auxiliary, {line['null']} null; {line['near_duplicates']} near duplicates left out",
            markup=False,
        )
        for note in line["notes"]:
            _OUT.print(f"  {note}", markup=False)
    for finding in context["findings"]:
        _OUT.print(f"{finding['severity']}: {finding['model']}: {finding['message']}", markup=False)
    for warning in context["warnings"]:
        _OUT.print(f"warning: {warning['defense']}: {warning['text']}", markup=False)
    _OUT.print(
        f"{len(prepared.cells)} cells, {len(prepared.refusals)} refused; at most about {_duration(total)} on {workers} workers"
    )


@app.command()
def audit(
    spec: SpecPath,
    out: Annotated[Path, typer.Option(help="output folder; created, or resumed if it holds this audit")],
    workers: Workers = None,
    fail_if: Annotated[str | None, typer.Option(help="exit 4 if true of any cell, e.g. 'asr > 0.05'")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print summary.json instead of the table")] = False,
) -> None:
    """Runs an audit, or what is left of it, and writes tables and report.

    Exit codes: 0 all done, 2 input error, 3 finished with failed cases, 4 --fail-if holds, 130 interrupted.

    Example: medpfl audit audit.yaml --out out/audit --fail-if "asr > 0.05"
    """
    from medpfl.audit import load_spec

    raise typer.Exit(_audit(load_spec(spec), out, workers, fail_if, as_json))


def _audit(spec: Any, out: Path, workers: int | None, fail_if: str | None, as_json: bool) -> int:
    from medpfl.audit import run_audit
    from medpfl.audit.limits import any_satisfies, parse_limit
    from medpfl.report import write_report

    condition = parse_limit(fail_if, "--fail-if") if fail_if is not None else None
    bar = _Bar()
    with bar.progress:
        summary = run_audit(spec, out, workers=workers, listener=bar)
    report = out / "report.html"
    if summary.computed or not report.exists():
        report = write_report(out)
    if as_json:
        typer.echo((out / "summary.json").read_text())
    else:
        _OUT.print(_cells_table(summary.cells))
        counts = summary.counts
        _OUT.print(f"{counts['done']} cases done, {counts['failed']} failed. Report: {report}", soft_wrap=True)
    if condition is not None and any_satisfies(condition, summary.cells):
        _ERR.print(f"--fail-if holds: {condition}")
        return EXIT_FAIL_IF
    return EXIT_FAILED_CASES if summary.counts["failed"] else 0


def _cells_table(cells: Any) -> Table:
    """The summary table: every number beside its null baseline."""
    axes = ("dataset", "model", "recipe", "threat_model", "channel", "defense", "attack")
    shown = [
        axis for axis in axes if axis in ("dataset", "defense", "attack") or len({cell[axis] for cell in cells}) > 1
    ]
    oracles = ["oracle"] if any(cell["oracle"] for cell in cells) else []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (*shown, *oracles, "ASR [95%]", "SSIM", "null", "PSNR dB", "null", "failed"):
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    for cell in cells:
        fixed = [str(cell[key]) for key in (*shown, *oracles)]
        if cell["status"] == "refused":
            table.add_row(*fixed, "refused", "", "", "", "", "")
            continue
        table.add_row(
            *fixed,
            f"{_number(cell['asr'], 2)} [{_number(cell['asr_low'], 2)}, {_number(cell['asr_high'], 2)}]",
            _number(cell["ssim_mean"], 2),
            _number(cell["null_nearest_ssim"], 2),
            _number(cell["psnr_mean"], 1),
            _number(cell["null_nearest_psnr"], 1),
            str(cell["failed"] or ""),
        )
    table.caption = (
        "Means over all victims. null: the pool image that is nearest to the truth; what does not beat it is no leak."
    )
    return table


def _number(value: Any, digits: int) -> str:
    return "-" if value is None or value != value else f"{value:.{digits}f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@app.command()
def report(
    folder: Folder,
    without_images: Annotated[
        bool, typer.Option("--without-images", help="leave out all images and item names")
    ] = False,
) -> None:
    """Writes report.html again from the tables in an output folder.

    Example: medpfl report out/audit --without-images
    """
    from medpfl.core.errors import StoreError
    from medpfl.report import write_report

    if not (folder / "cells.csv").is_file():
        raise StoreError(
            f"{folder}: holds no audit results (no cells.csv); run `medpfl audit SPEC --out {folder}` first"
        )
    _OUT.print(str(write_report(folder, images=not without_images)), soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="output folder")] = Path("out/demo"),
    workers: Workers = None,
) -> None:
    """Audits real medical images that ship inside the dependencies; takes a few minutes, needs no network.

    Example: medpfl demo --out out/demo
    """
    import yaml

    from medpfl.audit import parse_spec

    text = files("medpfl.cli").joinpath("demo.yaml").read_text(encoding="utf-8")
    raise typer.Exit(_audit(parse_spec(yaml.safe_load(text), base=Path.cwd()), out, workers, None, False))


for module in (listing, init, show, compare, export):
    module.register(app)


def main() -> None:
    """Entry point: turns the project's errors into one message and an exit code."""
    try:
        code = app(standalone_mode=False)
    except InputError as error:
        _ERR.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(EXIT_INPUT)
    except Interrupted as error:
        _ERR.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(EXIT_INTERRUPTED)
    except typer.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        import click

        if not isinstance(error, click.ClickException):
            raise
        error.show()
        sys.exit(EXIT_INPUT)
    sys.exit(code or 0)

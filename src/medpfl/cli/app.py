"""The command line: `medpfl`."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, NoReturn

import click
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from medpfl.cli import check, compare, export, filter_audit, init, listing, replay, show, vet
from medpfl.cli.check import SpecPath
from medpfl.cli.help import Command
from medpfl.cli.progress import progress
from medpfl.cli.texts import printable, wide_console
from medpfl.core.errors import InputError, Interrupted

EXIT_INPUT = 2
EXIT_FAILED_CASES = 3
EXIT_FAIL_IF = 4
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="medpfl",
    add_completion=False,
    suggest_commands=False,  # Click suggests the same
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Shows what can be reconstructed of patients' images from the updates of a federated model.\n\n"
    "Start with `medpfl demo`, or with `medpfl init`, `medpfl check audit.yaml` and `medpfl audit audit.yaml --out out`.",
)
_OUT = wide_console()
_ERR = Console(stderr=True)

Folder = Annotated[Path, typer.Argument(help="an audit's output folder", show_default=False)]
Workers = Annotated[int | None, typer.Option(min=0, help="worker processes; default one per core, or per GPU; 0: none")]
Limit = Annotated[
    str | None,
    typer.Option(help="what you call acceptable, e.g. 'asr<=0.05': the cheapest defense below is recommended"),
]
Device = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda or cuda:N; default the spec's, else a GPU where there is one")
]


@app.command()
def audit(
    spec: SpecPath,
    out: Annotated[Path, typer.Option(help="output folder; created, or resumed if it holds this audit")],
    workers: Workers = None,
    diagnose: Annotated[
        bool, typer.Option("--diagnose", help="find out what limits each attack, by a small sweep per cell")
    ] = False,
    utility: Annotated[
        bool, typer.Option("--utility", help="measure what each defense costs: train a federation under it")
    ] = False,
    limit: Limit = None,
    device: Device = None,
    fail_if: Annotated[str | None, typer.Option(help="exit 4 if true of any cell, e.g. 'asr > 0.05'")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print summary.json instead of the table")] = False,
) -> None:
    """Runs an audit, or what is left of it, and writes tables and report.

    With --diagnose each cell is attacked again with one condition changed at a time in the attacker's favor (true
    labels, batch norm in eval mode, batch size 1, a plain gradient, an untrained model, no defense, ...), then with all
    of them, and the report says which condition protects most. A finished audit can be diagnosed later.

    With --utility, or the key `utility` in the spec, a federation is trained under every defense (rounds of clients who
    share the pool's training images) and its model judged on held-out images: balanced accuracy and AUC beside the same
    federation without defense, clients who train alone, and guessing. The key alone is enough; the flag measures with
    the defaults where the spec has no key. A finished audit can be measured later.

    Exit codes: 0 all done, 2 input error, 3 finished with failed cases, 4 --fail-if holds, 130 interrupted.

    \b
    Examples:
      medpfl audit audit.yaml --out out/audit --fail-if "asr > 0.05"
      medpfl audit audit.yaml --out out/audit --diagnose
      medpfl audit audit.yaml --out out/audit --utility --limit "asr<=0.05"
    """
    from medpfl.audit import load_spec
    from medpfl.audit.limits import parse_limit

    loaded = load_spec(spec).limited(parse_limit(limit, "--limit") if limit is not None else None)
    loaded = loaded.diagnosed() if diagnose else loaded
    loaded = loaded.with_utility() if utility else loaded
    raise typer.Exit(_audit(loaded, out, workers, device, fail_if, as_json))


def _audit(spec: Any, out: Path, workers: int | None, device: str | None, fail_if: str | None, as_json: bool) -> int:
    from medpfl.audit import run_audit
    from medpfl.audit.limits import any_satisfies, parse_limit

    condition = parse_limit(fail_if, "--fail-if") if fail_if is not None else None
    with _termination_interrupts(), progress(_ERR) as display:
        summary = run_audit(spec, out, workers=workers, device=device, listener=display)
    report = out / "report.html"
    if summary.computed or not report.exists():
        report = _report(out)
    if as_json:
        typer.echo((out / "summary.json").read_text())
    else:
        _OUT.print(_cells_table(summary.cells))
        if summary.diagnosis:
            _OUT.print(_diagnosis_table(out))
        for found in summary.frontiers:
            _OUT.print(f"{found.dataset}, {found.model}, {found.recipe}: {found.advice}", soft_wrap=True, markup=False)
        counts = summary.counts
        _OUT.print(f"{counts['done']} cases done, {counts['failed']} failed. Report: {report}", soft_wrap=True)
    if condition is not None and any_satisfies(condition, summary.cells):
        _ERR.print(f"--fail-if holds: {condition}")
        return EXIT_FAIL_IF
    failed = summary.counts["failed"] or (summary.utility is not None and summary.utility["failed"])
    return EXIT_FAILED_CASES if failed else 0


def _report(out: Path) -> Path:
    """Writes the report of a finished audit. Whatever stops that, the user learns that it costs no results."""
    from medpfl.report import write_report

    written = None
    try:
        written = write_report(out)
        return written
    finally:
        if written is None:
            _ERR.print(
                f"All results are safe in {out}, only the report is missing; `medpfl report {out}` writes it",
                soft_wrap=True,
                markup=False,
                highlight=False,
            )


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Inside, SIGTERM (a service manager, a batch system) stops the audit as Ctrl-C does."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only there signals can be handled
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _cells_table(cells: Any) -> Table:
    """The summary table: every number beside its null baseline."""
    axes = ("dataset", "model", "recipe", "threat_model", "channel", "defense", "guard", "attack")
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


def _diagnosis_table(out: Path) -> Table:
    """What limits the attack of each diagnosed cell."""
    from medpfl.report.diagnosis import diagnoses
    from medpfl.report.diagnosis_wording import brief
    from medpfl.report.loading import load_audit
    from medpfl.report.table import namer

    audit = load_audit(out)
    name = namer(audit.cells)
    table = Table("diagnosed", "what limits the attack most", box=box.SIMPLE_HEAD, pad_edge=False)
    for found in diagnoses(audit):
        table.add_row(printable(name(found.cell)), printable(brief(found)))
    return table


def _number(value: Any, digits: int) -> str:
    return "-" if value is None or value != value else f"{value:.{digits}f}"


@app.command()
def report(
    folder: Folder,
    without_images: Annotated[
        bool, typer.Option("--without-images", help="leave out all images and item names")
    ] = False,
    limit: Limit = None,
) -> None:
    """Writes report.html again from the tables in an output folder, judged by another limit if one is given.

    \b
    Examples:
      medpfl report out/audit --without-images
      medpfl report out/audit --limit "gain_psnr <= 0"
    """
    from medpfl.audit.limits import parse_limit
    from medpfl.core.errors import StoreError
    from medpfl.report import write_report

    if not (folder / "cells.csv").is_file():
        raise StoreError(
            f"{folder}: holds no audit results (no cells.csv); run `medpfl audit SPEC --out {folder}` first"
        )
    judged = parse_limit(limit, "--limit") if limit is not None else None
    _OUT.print(str(write_report(folder, images=not without_images, limit=judged)), soft_wrap=True)


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
    raise typer.Exit(_audit(parse_spec(yaml.safe_load(text), base=Path.cwd()), out, workers, None, None, False))


for module in (check, listing, init, show, compare, export, vet, filter_audit, replay):
    module.register(app)
for command in app.registered_commands:
    command.cls = Command


def main() -> None:
    """Entry point: turns the project's errors into one message and an exit code."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except InputError as error:
        _end(EXIT_INPUT, f"error: {error}")
    except Interrupted as error:
        _end(EXIT_INTERRUPTED, str(error))
    except (typer.Abort, KeyboardInterrupt):
        _end(EXIT_INTERRUPTED, "stopped")
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "medpfl"
        text = " ".join(error.format_message().split()).removesuffix(".")
        _end(EXIT_INPUT, f"error: {text}; see `{command} --help`")
    except click.ClickException as error:
        _end(EXIT_INPUT, f"error: {error.format_message()}")
    except OSError as error:  # a full disk, a folder that went away: nothing that a traceback would explain
        where = f"{error.filename}: " if error.filename is not None else ""
        _end(EXIT_INPUT, f"error: {where}{error.strerror or error}; nothing that was finished is lost: {_WAY_OUT}")
    sys.exit(code or 0)


_WAY_OUT = "mend the cause and run the same command again"


def _end(code: int, message: str) -> NoReturn:
    """Says one line on stderr and exits."""
    typer.echo(printable(message), err=True)
    sys.exit(code)

"""`medpfl replay RECORDING`: attacks what a real federation sent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from medpfl.cli.progress import progress
from medpfl.cli.texts import printable, wide_console
from medpfl.core.errors import DataError, SpecError, suggestion

EXIT_FAILED_CASES = 3

MOST_ROWS = 60
"""Rows of the table in the terminal; of more the first and the last are shown."""


def register(app: typer.Typer) -> None:
    """Adds `replay`."""
    app.command("replay")(replay)


def replay(
    recordings: Annotated[
        list[Path],
        typer.Argument(metavar="RECORDING...", help="folders of recorders, one report for all", show_default=False),
    ],
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|FACTORY", help="the model that was trained (`medpfl list models`, or package.module:callable)"
        ),
    ],
    truth: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FOLDER",
            help="for those who own it: CLIENT.npz with images and labels, or folders RECORDING-truth; without it no scores",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="output folder; default out/replay/RECORDINGS")] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="attack, or {name: gradinv, iterations: 500}; may be repeated; default: four"
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]YAML", help="how clients train, e.g. '{batch_size: 8, local_steps: 4, learning_rate: 0.01}'"
        ),
    ] = None,
    defense: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]YAML",
            help="what clients do to updates, for attackers that know it: '{name: gaussian, std: 0.01}'",
        ),
    ] = None,
    pool: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="images of the attacker's own: half auxiliary knowledge, half null baselines"
        ),
    ] = None,
    round: Annotated[list[int] | None, typer.Option(help="only this round; may be repeated")] = None,
    client: Annotated[list[str] | None, typer.Option(help="only this client; may be repeated")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="images of an update that does not say how many")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="pixels per axis; default: what fits the tensors")] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="channels; default: of the first convolution")] = None,
    classes: Annotated[int | None, typer.Option(min=2, help="classes; default: the last layer's outputs")] = None,
    task: Annotated[str | None, typer.Option(help="single_label, multi_label or segmentation")] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="file with the 32 bytes that the recording is encrypted with")
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="SSIM from which an image counts as reconstructed")
    ] = 0.9,
    seed: Annotated[int, typer.Option(help="seed of the attacks")] = 0,
    diagnose: Annotated[
        bool, typer.Option("--diagnose", help="find out why each attack failed or worked on each update")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print summary.json instead of the table")] = False,
) -> None:
    """Attacks the updates of recorded federations and writes the same tables and report as an audit.

    Without --truth pictures and objectives are shown and no score is claimed. Several recordings (plain, with noise,
    behind SecAgg+) stand beside each other in one report; NAME is a recording's folder name. Run again it does what is
    left.

    With --diagnose each update is measured (noise, grids, clipping, batch norm, labels), and so is whether an attack's
    pictures would have sent it. With --truth the client's own step is replayed on the true images, and every attack is
    run again with one condition changed at a time. A finished replay can be diagnosed later.

    Exit codes: 0 all done, 2 input error, 3 finished with failed cases, 130 interrupted.

    \b
    Examples:
      medpfl replay recording --model lenet_dlg
      medpfl replay recording --model ours.models:make --attack gradinv --round 20
      medpfl replay plain noise --model lenet_dlg --defense 'noise={name: sign}'
    """
    from medpfl.audit.replay import by_recording, prepare_replay, recording_names, truth_folders
    from medpfl.audit.replay import replay as replayed
    from medpfl.federation.recording import FolderStorage, read_recording
    from medpfl.guards.vetting import TASKS
    from medpfl.report import write_report

    if task is not None and task not in TASKS:
        raise SpecError(f"unknown task '{task}': {suggestion(task, TASKS)}")
    names, opened = recording_names(recordings), _key(key)
    truths = truth_folders(truth or (), names)
    recipes = by_recording(recipe or (), names, "--recipe")
    defenses = by_recording(defense or (), names, "--defense")
    parts = [
        prepare_replay(
            name,
            read_recording(FolderStorage(path, opened)),
            model,
            attacks=[_plain(text, "--attack") for text in attack or ()],
            recipe=None if name not in recipes else _mapping(recipes[name], "--recipe"),
            defense=None if name not in defenses else _mapping(defenses[name], "--defense"),
            truth=truths.get(name),
            pool=pool,
            rounds=round or (),
            clients=client or (),
            examples=examples,
            size=size,
            channels=channels,
            classes=classes,
            task=task,
            threshold=threshold,
            seed=seed,
            search_path=(Path.cwd(),),
        )
        for name, path in zip(names, recordings, strict=True)
    ]
    folder = out or Path("out", "replay", "+".join(names))
    with progress(Console(stderr=True)) as display:
        summary = replayed(parts, folder, display, diagnose=diagnose)
    report = write_report(folder)
    if as_json:
        typer.echo((folder / "summary.json").read_text())
    else:
        console = wide_console()
        console.print(_table(summary.cells, any(one.truths is not None for one in parts), len(parts) > 1))
        if diagnose:
            _print_diagnosis(console, folder)
        counts = summary.counts
        console.print(f"{counts['done']} cases done, {counts['failed']} failed. Report: {report}", soft_wrap=True)
    raise typer.Exit(EXIT_FAILED_CASES if summary.counts["failed"] else 0)


def _key(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"--key '{path}': cannot be read ({error.strerror or error})") from None


def _plain(text: str, option: str) -> Any:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SpecError(
            f"{option}: '{text}' is not YAML; write for instance '{{name: gradinv, iterations: 500}}'"
        ) from None
    if not isinstance(found, str | dict):
        raise SpecError(f"{option}: expected a name or '{{name: ...}}', found {found!r}")
    return found


def _mapping(text: str, option: str) -> dict[str, Any]:
    found = _plain(text, option)
    if not isinstance(found, dict):
        raise SpecError(f"{option}: expected '{{batch_size: 8, learning_rate: 0.01}}', found {found!r}")
    return found


def _table(cells: Any, scored: bool, several: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (
        *(("recording",) if several else ()),
        "round",
        "attack",
        "updates",
        "failed",
        *(("ASR", "SSIM", "null", "PSNR dB", "null") if scored else ()),
    ):
        table.add_column(column, no_wrap=True)
    half = MOST_ROWS // 2
    chosen = list(cells) if len(cells) <= MOST_ROWS else [*cells[:half], None, *cells[-half:]]
    for cell in chosen:
        if cell is None:
            table.add_row(f"... {len(cells) - 2 * half} more in cells.csv")
            continue
        shown = (*(("dataset",) if several else ()), "model", "attack")
        fixed = [printable(str(cell[axis])) for axis in shown]
        if cell["status"] == "refused":
            table.add_row(*fixed, "refused")
            continue
        numbers = [
            "-" if (value := cell.get(key)) is None else f"{value:.{digits}f}"
            for key, digits in (("asr", 2), ("ssim_mean", 2), ("null_nearest_ssim", 2), ("psnr_mean", 1), ("null_nearest_psnr", 1))
        ]  # fmt: skip
        table.add_row(*fixed, str(cell["victims"]), str(cell["failed"] or ""), *(numbers if scored else ()))
    return table


def _print_diagnosis(console: Console, folder: Path) -> None:
    """What stands in the way of attacks, and how far they got; one sentence for updates that are alike."""
    from medpfl.report.loading import load_audit
    from medpfl.report.updates import groups, recorded_updates

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    for column in ("recording", "what", "updates", "for instance"):
        table.add_column(column, overflow="fold")
    for group in groups(recorded_updates(load_audit(folder).updates)):
        where = f"(round {group.example.round}, client {group.example.client})"
        name = f"{group.fact.title}: {group.fact.stands}" if group.fact.stands else group.fact.title
        table.add_row(
            printable(group.recording), printable(name), group.counted, printable(f"{group.fact.text} {where}")
        )
    console.print(table)
    console.print(f"All of it, update by update: {folder / 'diagnosis.csv'}", soft_wrap=True)

"""`medpfl vet FILE`: looks at a model that came from a server, before any training on it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from medpfl.cli.texts import printable, wide_console
from medpfl.core.domain import GlobalModel, Tensors
from medpfl.core.errors import InputError, suggestion
from medpfl.data import load_dataset
from medpfl.data.readers.folder import FolderReader
from medpfl.guards.vetting import CHECKS, MOST_IMAGES, TASKS, TaskName, Vetting, build_agreed, check_tensors
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
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FACTORY",
            help="the model as you build it (`medpfl list models`, or package.module:callable), to try its behavior",
        ),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a checkpoint that was trusted, such as the round before's")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="some of your own images (PNG, JPEG); default: drawn ones")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="pixels per axis of the images; default: what fits the file")
    ] = None,
    channels: Annotated[
        int | None, typer.Option(min=1, help="channels of the images; default: those of the first convolution")
    ] = None,
    classes: Annotated[
        int | None, typer.Option(min=2, help="classes of the model; default: the last layer's outputs")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="single_label, multi_label or segmentation; default: as the model is used here")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="write JSON to standard output instead of text")] = False,
) -> None:
    """Look at a model that came from a server before training on it; runs no code from the file.

    Tensors alone show crafted models that nobody disguised. With --model the file's tensors are loaded into your own
    build of the model, and one client step is simulated on a few images: what it gives back shows the others, too.

    Exit codes: 0 passed, 1 something was found (do not train on it before you know why), 2 input error.

    \b
    Examples:
      medpfl vet round7.pt --model resnet18 --size 224 --reference round6.pt
      medpfl vet round7.safetensors --model ours.models:make --images local --json
    """
    tensors = _read(file)
    earlier = None if reference is None else _read(reference)
    agreed = None
    if model is not None:
        agreed = build_agreed(
            model,
            tensors,
            size=size,
            channels=channels,
            classes=classes,
            task=_task(task),
            search_path=(Path.cwd(),),
        )
    elif unused := [
        name
        for name, value in (("images", images), ("size", size), ("channels", channels), ("classes", classes))
        if value is not None
    ]:
        raise InputError(f"--{unused[0]} needs a model that can be run: give --model as well")
    own = None if images is None or agreed is None else _own_images(images, agreed)
    found = vetted(tensors, earlier, own, agreed=agreed)
    if as_json:
        typer.echo(json.dumps(as_plain(file, found), indent=2, ensure_ascii=False))
    else:
        _print(file, found)
    raise typer.Exit(0 if found.passed else EXIT_FOUND)


def _task(name: str | None) -> TaskName | None:
    for known in TASKS:
        if name == known:
            return known
    if name is None:
        return None
    raise InputError(f"unknown task '{name}': {suggestion(name, TASKS)}")


def _own_images(folder: Path, model: GlobalModel) -> Tensor:
    """As many images from the folder as vetting uses, in the model's shape."""
    channels = model.image_shape[0]
    if channels not in (1, 3):
        raise InputError(f"--images gives gray or color images, but the model takes {channels} channels: leave it out")
    reader = FolderReader(path=folder)
    kept: Literal[1, 3] = 3 if channels == 3 else 1
    size = tuple(model.image_shape[1:])
    return load_dataset(reader, name="images", size=size, channels=kept, maximum=MOST_IMAGES).images


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
        "behavior": found.behavior,
        "reasons": list(found.reasons),
        "checks": checks,
        "not_covered": list(found.not_covered),
    }


def _finite(score: float) -> float | None:
    return score if math.isfinite(score) else None


def _print(file: Path, found: Vetting) -> None:
    console = wide_console()
    table = Table(
        "check",
        "looks for",
        "result",
        "score",
        "limit",
        "what was seen, or is looked for",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
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
    if found.behavior_checked:
        console.print(Text(f"Behavior was checked: {found.behavior}."), soft_wrap=True)
    else:
        console.print(
            Text(
                f"Behavior was not checked: {printable(found.behavior)}. Only tensors were looked at, which a careful "
                "attacker disguises."
            ),
            soft_wrap=True,
        )
    console.print("\nNot covered:")
    for text in found.not_covered:
        console.print(Text(f"  {text}"), soft_wrap=True)

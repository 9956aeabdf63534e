"""`medpfl init`: a commented spec for one data set and one model."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.text import Text

from medpfl.audit.spec import parse_spec
from medpfl.audit.validation import build, field_names
from medpfl.cli.texts import printable
from medpfl.core.errors import DataError, InputError
from medpfl.data import READERS, Reader, resolve_path
from medpfl.models import MODELS, SEGMENTATION

PHANTOM = "phantom"
READER_OF_SUFFIX = {
    ".png": "folder",
    ".jpg": "folder",
    ".jpeg": "folder",
    ".csv": "csv",
    ".npz": "medmnist",
    ".dcm": "dicom",
    ".dicom": "dicom",
    ".ima": "dicom",
    ".nii": "nifti",
}
LOOKED_AT = 2_000
"""Files of a folder that are looked at to guess its reader."""


@dataclass(frozen=True)
class Answers:
    """What the spec is made of. `path` and `masks` are as they will stand in the spec, None where there are none.

    segments: whether the model is trained with masks.
    """

    name: str
    path: str | None
    reader: str
    model: str
    size: int
    channels: int
    classes: tuple[str, ...]
    masks: str | None = None
    segments: bool = False


def register(app: typer.Typer) -> None:
    """Adds `init`."""
    app.command("init")(init)


def init(
    data: Annotated[
        str | None, typer.Option("--data", metavar="PATH", help="folder or file with the images", show_default=False)
    ] = None,
    reader: Annotated[
        str | None,
        typer.Option("--reader", help="how the images are read  [default: guessed from PATH]", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="a name of `medpfl list models`, or package.module:callable", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="the spec to write")] = Path("audit.yaml"),
    size: Annotated[int, typer.Option("--size", min=11, help="height and width that images are brought to")] = 32,
    channels: Annotated[
        int | None,
        typer.Option("--channels", help="1 (gray) or 3 (color)  [default: as the first image]", show_default=False),
    ] = None,
    masks: Annotated[
        str | None,
        typer.Option("--masks", metavar="PATH", help="folder or file with masks for segmentation", show_default=False),
    ] = None,
) -> None:
    """Write a commented spec for your images and your model; asks for what is not given.

    \b
    Examples:
      medpfl init
      medpfl init --data scans/ --model resnet18_cifar --size 64
      medpfl init --data scans/ --masks drawn/ --model unet_small
      medpfl init --reader phantom --model lenet_dlg --out try.yaml
    """
    if os.path.lexists(out):
        raise InputError(f"{out}: exists already and is not overwritten; give another name with --out")
    if channels not in (None, 1, 3):
        raise InputError(f"--channels: expected 1 or 3, found {channels}")
    if reader is not None:
        READERS[reader]
    if data is None and reader != PHANTOM:
        data = _ask("Folder or file with the images", "--data PATH")
    path = resolve_path(data, Path()) if data is not None and reader != PHANTOM else None
    if path is not None and reader is None:
        reader = guess_reader(path) or _ask(
            f"Reader ({', '.join(READERS.names())})", f"--reader NAME (no known file in '{path}' suggests one)"
        )
    if model is None:
        model = _ask("Model (`medpfl list models`, or package.module:callable)", "--model NAME", "lenet_dlg")
    if ":" not in model:
        MODELS[model]
    assert reader is not None
    mask_path = resolve_path(masks, Path()) if masks is not None else None
    source, found_channels = _opened(reader, path, mask_path)
    answers = Answers(
        name=_identifier(path.name if path is not None else PHANTOM),
        path=_as_written(data, path, out),
        reader=reader,
        model=model,
        size=size,
        channels=channels or found_channels,
        classes=source.class_names(),
        masks=_as_written(masks, mask_path, out),
        segments=model in SEGMENTATION or (":" in model and masks is not None),
    )
    text = spec_text(answers)
    parse_spec(yaml.safe_load(text), base=out.parent)
    _write_new(out, text)
    console = Console(highlight=False)
    console.print(Text(f"Written: {printable(str(out))} ({reader}, {len(answers.classes)} classes)"), soft_wrap=True)
    console.print(Text(f"Next: medpfl check {printable(str(out))}"), soft_wrap=True)


def guess_reader(path: Path) -> str | None:
    """The reader that fits a file, or most files of a folder, by their suffix; None if none does."""
    if path.is_file():
        return _reader_of(path.name)
    counts: Counter[str] = Counter()
    looked_at = 0
    for _, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        counts.update(found for name in names if (found := _reader_of(name)) in ("folder", "dicom", "nifti"))
        looked_at += len(names)
        if looked_at > LOOKED_AT:
            break
    return counts.most_common(1)[0][0] if counts else None


def spec_text(answers: Answers) -> str:
    """The commented YAML."""
    path = f"\n    path: {_quoted(answers.path)}    # relative to this file" if answers.path is not None else ""
    if answers.masks is not None:
        path += f"\n    mask_path: {_quoted(answers.masks)}    # for segmentation; names of more than two classes: mask_classes"
    elif answers.segments and answers.path is not None:
        path += "\n    # mask_path: MASKS    # the model is trained with masks; without them its cells are refused"
    model = f"factory: {_quoted(answers.model)}" if ":" in answers.model else f"name: {answers.model}"
    classes = ""
    if answers.segments and ":" in answers.model:
        classes = "\n    task: segmentation    # trained with masks; leave it out for a model with one output per class"
    elif len(answers.classes) == 1 and not answers.segments:
        classes = "\n    classes: 2    # the images have one class; a model with one output would learn nothing"
    small = answers.model.startswith("lenet")
    attacks = (
        "  - {name: dlg, iterations: 300}\n  - {name: cpl, iterations: 300}"
        if small
        else "  - {name: gradinv, iterations: 1000}"
    )
    return f"""\
# An audit: what can be reconstructed of these images from a client's update?
# Every list is an axis: each data set meets each model, recipe, threat model, channel, defense and attack.
# `medpfl check` shows the grid and what it costs; `medpfl audit` runs it.
name: {_quoted(answers.name)}
seed: 0    # or seeds: [0, 1, 2]

data:
  - name: {_quoted(answers.name)}
    reader: {answers.reader}    # settings: medpfl describe readers {answers.reader}{path}
    size: {answers.size}    # height and width in pixels; larger is slower
    channels: {answers.channels}    # 1 gray, 3 color
    victims: 8    # clients that are attacked; more give narrower intervals

models:    # more: medpfl list models
  - {model}{classes}
    state: untrained    # or {{trained: {{epochs: 5}}}}, or the path of a checkpoint
    # normalize: {{mean: [0.5], std: [0.25]}}    # where the model expects it; one number per channel

recipes:    # how clients train and what they send
  - {{update: gradient, batch_size: 1}}
  # - {{update: delta, batch_size: 4, local_steps: 2, learning_rate: 0.01}}

threat_models:    # who listens: medpfl list threat_models; what may be known: medpfl list knowledge
  - {{name: honest_server, knows: []}}

channels:
  - {{name: plain}}

defenses:    # more: medpfl list defenses
  - {{name: none}}
  - {{name: laplace, scale: 0.01, label: laplace-100}}
  # - {{compose: [{{name: clip, bound: 1}}, {{name: gaussian, std: 0.1}}], label: clipped-noise}}    # with a guarantee

guards: []

attacks:    # settings and presets: medpfl describe attacks NAME
{attacks}

# limit: "asr <= 0.05"    # what you call acceptable; the report says whether it holds, and what costs least below it
# utility: {{rounds: 20, clients: 4, partition: iid, seeds: 3}}    # trains a federation under every defense: what it costs
"""


def _opened(reader: str, path: Path | None, masks: Path | None = None) -> tuple[Reader, int]:
    """The reader, and 1 or 3 by its first image; a gray image that is stored as color is gray."""
    if path is None and "path" in field_names(READERS[reader].item):
        raise InputError(f"--data: reader '{reader}' needs a path")
    if masks is not None and "mask_path" not in field_names(READERS[reader].item):
        raise InputError(f"--masks: reader '{reader}' reads no masks; use folder or nifti")
    values = {key: value for key, value in (("path", path), ("mask_path", masks)) if value is not None}
    source = build(READERS[reader].item, values, f"reader {reader}")
    sample = next(iter(source.read(maximum=1)), None)
    if sample is None:
        raise DataError(f"'{path}' holds no images that reader '{reader}' can read; give another --reader")
    image = sample.image
    return source, 3 if image.shape[0] == 3 and not bool((image == image[:1]).all()) else 1


def _ask(question: str, option: str, default: str | None = None) -> str:
    if not sys.stdin.isatty():
        raise InputError(f"{option} is missing, and there is no terminal to ask for it; give it")
    answer: str = typer.prompt(question, default=default)
    return answer


def _reader_of(name: str) -> str | None:
    lower = name.lower()
    return "nifti" if lower.endswith(".nii.gz") else READER_OF_SUFFIX.get(Path(lower).suffix)


def _as_written(data: str | None, path: Path | None, out: Path) -> str | None:
    """The path relative to the spec; absolute paths, `~` and `package:` stay as they were given."""
    if data is None or path is None:
        return None
    if data.startswith(("package:", "~")) or Path(data).is_absolute():
        return data
    return Path(os.path.relpath(path, out.parent)).as_posix()


def _identifier(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:60] or "data"


def _quoted(text: str | None) -> str:
    """A YAML string on one line; plain where that is safe."""
    plain = text or ""
    return (
        plain if re.fullmatch(r"[A-Za-z][A-Za-z_/-]*", plain) and yaml.safe_load(plain) == plain else json.dumps(plain)
    )


def _write_new(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another place with --out") from None

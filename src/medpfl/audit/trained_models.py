"""Trained models of an audit: their names, which of them come from one training, and who trains them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from medpfl.audit.entries import DataEntry, ModelEntry
from medpfl.audit.grid import Cell
from medpfl.audit.validation import as_plain
from medpfl.core.errors import StoreError
from medpfl.core.files import locked, make_private_folder, unwritable


def training_kind(entry: ModelEntry) -> tuple[Any, ...]:
    """Equal for trainings that differ in their length only: the longer one passes through the shorter one's model."""
    assert entry.training is not None  # the caller sees to that
    settings = {key: value for key, value in as_plain(entry.training).items() if key not in ("epochs", "steps")}
    return entry.name, {**entry.params, "state": settings}


def meets(entry: ModelEntry, data: DataEntry) -> bool:
    """Whether a model is one for this data."""
    values = entry.only.get("dataset")
    return values is None or data.id in values or data.name in values


def changed_by(cell: Cell) -> tuple[str, ...]:
    """The defense that gives the model another architecture; empty if it stays as it is."""
    return (cell.defense.stream,) if cell.defense.defense.changes_model else ()


def model_kind(cell: Cell) -> tuple[str, ...]:
    """Equal for cells that start from the same model."""
    return cell.dataset.id, cell.model.id, *changed_by(cell)


def model_key(cell: Cell, seed: int) -> str:
    """Names a model of an audit, for instance `brain_mri/lenet_dlg/s0`."""
    return "/".join((*model_kind(cell), f"s{seed}"))


def another_trained_model(name: str, folder: Path) -> StoreError:
    """What to raise where a trained model is not the one that an audit's earlier results were computed with."""
    return StoreError(
        f"{folder}: the trained model {name} is not the one that earlier results were computed with "
        "(its file in the cache was changed, or it was trained again elsewhere); put the file back or use another --out"
    )


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Inside, no other process makes the file `path`: the first one trains, the others wait and load."""
    with ExitStack() as held:
        try:
            make_private_folder(path.parent)
            held.enter_context(locked(path.with_suffix(".lock"), wait=True))
        except OSError as error:
            raise unwritable(path, error) from None
        yield

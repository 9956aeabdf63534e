"""What protects a cell: the same cell with one condition changed in the attacker's favor, for every such condition.

The changed cells are ordinary cells that meet the first victims of the cell they diagnose. A changed cell that the
audit has anyway is not computed again, and cells that become the same by a change share what they lead to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from medpfl.audit.entries import MARK, Entry
from medpfl.audit.entry_parsing import PARSERS, threat_model_params
from medpfl.audit.grid import Cell
from medpfl.audit.spec import Spec
from medpfl.audit.validation import as_plain
from medpfl.core.domain import Recipe
from medpfl.core.seeding import content_hash

E = TypeVar("E", bound=Entry)

ALL = "all"
"""The name of all changes of a cell together."""


@dataclass(frozen=True)
class Change:
    """A change of the cell with the id `base`, and the cell that it leads to."""

    base: str
    name: str
    cell: Cell


def sweep(spec: Spec, cells: Sequence[Cell]) -> tuple[Change, ...]:
    """The changes of every cell, one at a time and then all together; none unless the spec asks for a diagnosis.

    Where a change leads to one of `cells`, it is that one; other cells are limited to the victims of the diagnosis.
    """
    if spec.diagnose is None:
        return ()
    known = {cell.id: cell for cell in cells}
    found = []
    for cell in cells:
        together, names = cell, []
        for name, change in CHANGES.items():
            changed = change(cell)
            if changed is not None:
                names.append(name)
                together = change(together) or together
                found.append(Change(cell.id, name, _resolved(changed, spec, known)))
        if len(names) > 1:
            found.append(Change(cell.id, ALL, _resolved(together, spec, known)))
    return tuple(found)


def extra_cells(changes: Iterable[Change]) -> list[Cell]:
    """The cells that exist for the diagnosis only, each once."""
    return list({change.cell.id: change.cell for change in changes if is_extra(change.cell.id)}.values())


def is_extra(cell: str) -> bool:
    """Whether a cell with that id exists for the diagnosis of others only."""
    return MARK in cell


def _resolved(cell: Cell, spec: Spec, known: Mapping[str, Cell]) -> Cell:
    """The audit's own cell that is the same, if it has one; else a cell of own entries as far as there are any."""
    entries = {axis: _own(entry, spec.axes[axis]) for axis, entry in cell.entries.items()}
    own: Cell = replace(cell, **entries)  # type: ignore[arg-type]
    if own.id in known:
        return known[own.id]
    assert spec.diagnose is not None  # the caller sees to that
    marked = own if is_extra(own.id) else cell  # a cell that `only` excludes keeps an id that tells what it is for
    return replace(marked, most_victims=spec.diagnose.victims)


def _own(entry: Entry, entries: Iterable[Entry]) -> Entry:
    """The entry of the spec that means the same as a changed one; the changed one where there is none."""

    def means(other: Entry) -> tuple[Any, Any]:
        return (None if other.axis == "recipe" else other.name), other.params

    return next((other for other in entries if MARK in entry.id and means(other) == means(entry)), entry)


def _changed(entry: E, params: Mapping[str, Any], **fields: Any) -> E:
    """An entry with other settings, under an id that tells them apart and still begins as before (`Entry.stream`)."""
    name = fields.pop("name", entry.name)
    identifier = f"{fields.pop('stem', entry.stream)}{MARK}{content_hash(name, params)[:6]}"
    return replace(entry, name=name, id=identifier, only={}, params=params, **fields)


def _knows(word: str, cell: Cell) -> Cell | None:
    attack, entry = cell.attack.attack.told(word), cell.threat_model
    if attack is None or (word == "masks") != cell.model.segments:  # what the model is trained with
        return None
    knows = entry.knows | {word}
    if word not in entry.knows:
        params = threat_model_params(entry.can, knows, entry.withhold, entry.auxiliary)
        entry = _changed(entry, params, knows=knows)
    return replace(cell, threat_model=entry, attack=_changed(cell.attack, as_plain(attack), attack=attack))


def _recipe_known(cell: Cell) -> Cell | None:
    entry = cell.threat_model
    withhold = entry.withhold - {"recipe"}
    if withhold == entry.withhold:
        return None
    params = threat_model_params(entry.can, entry.knows, withhold, entry.auxiliary)
    return replace(cell, threat_model=_changed(entry, params, withhold=withhold))


def _recipe(name: str, cell: Cell) -> Cell | None:
    recipe = RECIPE_CHANGES[name](cell.recipe.recipe)
    if recipe is None:
        return None
    return replace(cell, recipe=_changed(cell.recipe, as_plain(recipe), name=recipe.default_id, recipe=recipe))


def _batch_norm_eval(recipe: Recipe) -> Recipe | None:
    return replace(recipe, batch_norm="eval") if recipe.batch_norm == "train" else None


def _plain_gradient(recipe: Recipe) -> Recipe | None:
    if recipe.update == "gradient" or (recipe.local_steps * recipe.epochs == 1 and recipe.optimizer == "sgd"):
        return None
    images = recipe.images if recipe.local_steps == 1 else None
    return replace(recipe, update="gradient", local_steps=1, epochs=1, images=images)


def _batch_size_1(recipe: Recipe) -> Recipe | None:
    return None if recipe.batch_size == 1 else replace(recipe, batch_size=1, images=None, accumulation=1)


RECIPE_CHANGES: Mapping[str, Callable[[Recipe], Recipe | None]] = {
    "batch_norm_eval": _batch_norm_eval,
    "plain_gradient": _plain_gradient,
    "batch_size_1": _batch_size_1,
}
"""What is changed in how a client trains: each gives the changed recipe, or None where it is like that already."""


def _untrained(cell: Cell) -> Cell | None:
    if cell.model.state.startswith("untrained"):
        return None
    params = {**cell.model.params, "state": "untrained"}
    return replace(
        cell,
        model=_changed(cell.model, params, stem=cell.model.name, state="untrained", training=None, checkpoint=None),
    )


def _without(axis: str, name: str, cell: Cell) -> Cell | None:
    if cell.entries[axis].name == name:
        return None
    plain = PARSERS[axis]({"name": name}, axis, Path())
    return replace(cell, **{axis: _changed(plain, plain.params)})  # type: ignore[arg-type]


CHANGES: Mapping[str, Callable[[Cell], Cell | None]] = {
    "labels_given": partial(_knows, "labels"),
    "masks_given": partial(_knows, "masks"),
    "recipe_known": _recipe_known,
    **{name: partial(_recipe, name) for name in RECIPE_CHANGES},
    "untrained": _untrained,
    "no_defense": partial(_without, "defense", "none"),
    "no_guard": partial(_without, "guard", "none"),
    "plain_channel": partial(_without, "channel", "plain"),
}
"""What is changed: each gives the changed cell, or None where the cell is like that already."""

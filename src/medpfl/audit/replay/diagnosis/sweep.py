"""The cells of a diagnosis: those of the replay again, with one condition changed at a time, then all together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from medpfl.audit.diagnosis import ALL
from medpfl.audit.entries import AXES, MARK, AttackEntry
from medpfl.audit.replay.cells import ReplayCell
from medpfl.audit.replay.columns import cell_id
from medpfl.audit.replay.diagnosis.changes import AXIS, Owned, possible
from medpfl.audit.replay.diagnosis.subjects import Known
from medpfl.audit.spec import Diagnose
from medpfl.core.errors import InputError
from medpfl.core.seeding import content_hash


@dataclass(frozen=True)
class ChangedCell:
    """A changed cell. change: its name. victims: numbers of the victims that it is computed for. refusal: why it cannot
    be computed, None if it can."""

    id: str
    change: str
    cell: ReplayCell
    victims: tuple[int, ...]
    refusal: str | None


def sweep(cells: Mapping[str, ReplayCell], known: Known) -> Iterator[ChangedCell]:
    """All changes of all cells, for the first victims whose truth is known (as many as an audit's diagnosis meets)."""
    for base, cell in cells.items():
        owned = {
            victim: found
            for victim, update in enumerate(cell.updates[: Diagnose().victims])
            if isinstance(found := known.owned(cell.settings, update), Owned)
        }
        names = dict.fromkeys(name for one in owned.values() for name in possible(one, cell.entry.attack))
        for name in sorted(names, key=[*AXIS, ALL].index):
            changes = tuple(one for one in names if one != ALL) if name == ALL else (name,)
            yield _changed_cell(name, replace(cell, changes=changes, base=base), tuple(owned), known)


def _changed_cell(name: str, cell: ReplayCell, victims: tuple[int, ...], known: Known) -> ChangedCell:
    entry = _told(cell.entry) if "labels_given" in cell.changes else cell.entry
    columns = dict(cell.columns)
    for axis in AXES:
        if own := [change for change in cell.changes if AXIS[change] == axis]:
            columns[axis] = f"{columns[axis]}{MARK}{content_hash(own)[:6]}"
            columns[f"{axis}_params"] = json.dumps({**json.loads(columns[f"{axis}_params"]), "changed": own})
    columns["oracle"] = "labels" if "labels_given" in cell.changes else ""
    columns["adaptive"] = columns["adaptive"] and "clean_update" not in cell.changes
    found = replace(cell, entry=entry, columns=columns)
    return ChangedCell(cell_id(columns), name, found, victims, _refusal(found, victims, known))


def _told(entry: AttackEntry) -> AttackEntry:
    attack = entry.attack.told("labels")
    return entry if attack is None else replace(entry, attack=attack)


def _refusal(cell: ReplayCell, victims: tuple[int, ...], known: Known) -> str | None:
    """Why the attack cannot run under this change, by the first victim."""
    try:
        seen, _ = cell.case(victims[0], known)
    except InputError as error:
        return str(error)
    return cell.entry.attack.why_not(seen.model, seen.recipe, seen.update.kind, seen.examples)


def as_stored(found: ChangedCell) -> dict[str, Any]:
    """As `medpfl.audit.effects` reads it."""
    return {"cell": found.cell.base, "change": found.change, "changed": found.id}

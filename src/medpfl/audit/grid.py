"""The grid: every combination of entries that their `only` admits, with the reason where it cannot run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from medpfl.audit.entries import (
    AXES,
    AttackEntry,
    ChannelEntry,
    DataEntry,
    DefenseEntry,
    Entry,
    GuardEntry,
    ModelEntry,
    RecipeEntry,
    ThreatModelEntry,
)
from medpfl.audit.spec import Spec
from medpfl.audit.threat_models import THREAT_MODELS
from medpfl.core.domain import CAPABILITIES, KNOWLEDGE, ORACLES
from medpfl.core.errors import SpecError
from medpfl.core.seeding import content_hash


@dataclass(frozen=True)
class Cell:
    """One combination of entries."""

    dataset: DataEntry
    model: ModelEntry
    recipe: RecipeEntry
    threat_model: ThreatModelEntry
    channel: ChannelEntry
    defense: DefenseEntry
    guard: GuardEntry
    attack: AttackEntry
    most_victims: int | None = None
    """Only so many of the first victims, in cells that exist for the diagnosis of others; None for all."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Axis name -> entry."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def id(self) -> str:
        """Ids of the entries joined by '/', the `cell` column."""
        return "/".join(entry.id for entry in self.entries.values())

    @property
    def stream(self) -> str:
        """What the attack's random stream is keyed by: the id, or in a cell of a diagnosis what it was before.

        The same with and without a guard, so that a guard meets what would have happened without it.
        """
        return "/".join("none" if axis == "guard" else entry.stream for axis, entry in self.entries.items())

    @property
    def victims(self) -> int:
        """How many clients are attacked, for each seed."""
        planned = self.dataset.settings.victims
        return planned if self.most_victims is None else min(planned, self.most_victims)

    @property
    def definition(self) -> dict[str, Any]:
        """Everything that determines the cell's results, as plain values."""
        axes = {axis: {"name": entry.name, "params": entry.params} for axis, entry in self.entries.items()}
        return axes if self.most_victims is None else {**axes, "victims": self.victims}

    @property
    def fingerprint(self) -> str:
        """Hash of the definition."""
        return content_hash(self.definition)

    @property
    def read(self) -> frozenset[str]:
        """Granted knowledge that the attack reads; it sees nothing else of what is granted."""
        attack = self.attack.attack
        return self.threat_model.knows & (attack.requires() | attack.uses())

    @property
    def oracle(self) -> str:
        """Oracle knowledge that the attack reads, sorted and joined by ';'."""
        return ";".join(sorted(self.read & ORACLES))

    @property
    def adaptive(self) -> bool:
        """Whether the attack knows the mechanism of a defense that is there."""
        return "defense" in self.read and self.defense.name != "none"


def cells(spec: Spec) -> list[Cell]:
    """All cells in the order of the axes. Raises SpecError when there is none."""
    found = list(_admitted(spec))
    if not found:
        raise SpecError(
            "no cell is left: the `only` restrictions exclude each other, or every data entry has `victims: 0`"
        )
    used = {(axis, entry.id) for cell in found for axis, entry in cell.entries.items()}
    for axis in AXES:
        for entry in spec.axes[axis]:
            auxiliary_only = isinstance(entry, DataEntry) and entry.settings.victims == 0
            if (axis, entry.id) not in used and not auxiliary_only:
                raise SpecError(f"{axis} '{entry.id}' is in no cell: check the `only` restrictions")
    return found


def _admitted(spec: Spec) -> Iterator[Cell]:
    for combination in itertools.product(*(spec.axes[axis] for axis in AXES)):
        cell = Cell(*combination)  # type: ignore[arg-type]
        if cell.dataset.settings.victims > 0 and all(_admits(entry, cell) for entry in cell.entries.values()):
            yield cell


def _admits(entry: Entry, cell: Cell) -> bool:
    return all(
        cell.entries[axis].id in values or cell.entries[axis].name in values for axis, values in entry.only.items()
    )


def refusal(cell: Cell) -> str | None:
    """Why a cell cannot run as far as the spec alone tells; None if nothing speaks against it."""
    attack = cell.attack.attack
    missing = attack.requires() - cell.threat_model.knows
    if missing:
        listed = ", ".join(f"{word} ({KNOWLEDGE[word]})" for word in sorted(missing))
        return f"{cell.attack.name} needs knowledge that {cell.threat_model.id} does not grant: {listed}"
    if lacking := attack.needs() - cell.threat_model.can:
        listed = ", ".join(f"{word} ({CAPABILITIES[word]})" for word in sorted(lacking))
        return f"{cell.attack.name} needs a malicious server that can more than {cell.threat_model.id}: {listed}"
    if not cell.channel.channel.reveals_individual_updates and not _listener(cell).sees_inside_channel:
        return f"{cell.threat_model.id} sees nothing behind the channel {cell.channel.id}"
    return None


def _listener(cell: Cell) -> Any:
    return THREAT_MODELS[cell.threat_model.name].item

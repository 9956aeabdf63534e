"""A cell of a replay: one attack on one round of one recording, as it is or under changed conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medpfl.audit.entries import AttackEntry
from medpfl.audit.replay.columns import told
from medpfl.audit.replay.diagnosis.changes import changed, joined
from medpfl.audit.replay.diagnosis.subjects import Known
from medpfl.audit.replay.observing import observe
from medpfl.audit.replay.settings import Replay
from medpfl.core.domain import Observation
from medpfl.core.errors import DataError
from medpfl.federation.recording import Recorded
from medpfl.metrics.truth import GroundTruth


@dataclass(frozen=True)
class ReplayCell:
    """One attack on one round of one recording; its victims are the round's clients in the order of their names.

    columns: ids and parameters on every axis. changes: what a diagnosis changed for its victims, by name; base: the id
    of the cell that it diagnoses, empty where nothing was changed.
    """

    settings: Replay
    updates: tuple[Recorded, ...]
    entry: AttackEntry
    columns: Mapping[str, Any]
    changes: tuple[str, ...] = ()
    base: str = ""

    def case(self, victim: int, known: Known) -> tuple[Observation, GroundTruth | None]:
        """What the attack sees of one victim, and the images behind it where they are known.

        Raises InputError where the update cannot be read, or the change cannot be carried out on it.
        """
        settings, update, attack = self.settings, self.updates[victim], self.entry.attack
        reads = attack.requires() | attack.uses()
        observation = observe(
            settings.recording,
            update,
            settings.model,
            settings.known_recipe,
            examples=settings.examples,
            auxiliary=settings.auxiliary if "auxiliary" in reads else None,
            defense=told(settings, self.entry),
        )
        if not self.changes:
            return observation, None if settings.truths is None else settings.truths.of(update)
        owned = known.owned(settings, update)
        if isinstance(owned, str):
            raise DataError(owned)
        observation, groups = changed(owned, self.changes, observation)
        return observation, joined(groups)

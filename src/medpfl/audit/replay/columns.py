"""What a cell of a replay is called, and which of them cannot be computed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from medpfl.audit.entries import AXES, AttackEntry
from medpfl.audit.replay.observing import observed_kind
from medpfl.audit.replay.settings import Replay
from medpfl.core.mechanisms import Mechanism
from medpfl.federation.recording import Recorded


def cell_columns(settings: Replay, updates: Sequence[Recorded], entry: AttackEntry) -> dict[str, Any]:
    """Ids and parameters on every axis, for one attack on one round of one recording."""
    about, number = settings.recording.about, updates[0].round
    clients = {} if (together := updates[0].config.get("clients")) is None else {"clients": together}
    recipe, defense = settings.recipe, settings.defense
    if defense is not None:
        changed: tuple[str, Mapping[str, Any]] = defense.id, {"name": defense.name, **defense.params}
    else:
        changed = ("as-recorded", {"name": about.defense}) if about.defense else ("none", {"name": "none"})
    knows = [*(["auxiliary"] if settings.auxiliary else []), *(["defense"] if told(settings, entry) else [])]
    values: dict[str, tuple[str, Mapping[str, Any]]] = {
        "dataset": (settings.name, {"name": settings.name, "recording": True}),
        "model": (f"{_short(settings.model.name)}-round-{number:03d}", {"name": settings.model.name, "round": number}),
        "recipe": ("withheld", {}) if recipe is None else (recipe.id, {"name": recipe.name, **recipe.params}),
        "threat_model": ("honest_server", {"name": "honest_server", "knows": knows}),
        "channel": (about.channel or "plain", {"name": about.channel or "plain", **clients}),
        "defense": changed,
        "guard": ("none", {"name": "none"}),
        "attack": (entry.id, {"name": entry.name, **entry.params}),
    }
    found: dict[str, Any] = {axis: values[axis][0] for axis in AXES}
    return {
        **found,
        **{f"{axis}_params": json.dumps(dict(values[axis][1])) for axis in AXES},
        "oracle": "",
        "adaptive": told(settings, entry) is not None,
    }


def cell_id(columns: Mapping[str, Any]) -> str:
    """The cell's name, from its ids."""
    return "/".join(str(columns[axis]) for axis in AXES)


def told(settings: Replay, entry: AttackEntry) -> Mechanism | None:
    """The mechanism of the clients' defense, where it was given and the attack reads it."""
    if settings.defense is None or settings.defense.name == "none":
        return None
    reads = entry.attack.requires() | entry.attack.uses()
    return settings.defense.defense.mechanism() if "defense" in reads else None


def refusal(settings: Replay, updates: Sequence[Recorded], entry: AttackEntry) -> str | None:
    """Why an attack cannot run on these updates; None if nothing speaks against it."""
    attack = entry.attack
    granted = {*(["auxiliary"] if settings.auxiliary else []), *(["defense"] if settings.defense else [])}
    if attack.needs():
        return f"{entry.name} is an attack of a malicious server, which this recording is not of"
    if missing := attack.requires() - granted:
        return f"{entry.name} needs knowledge that a replay does not have: {', '.join(sorted(missing))}"
    count = next((one.examples for one in updates if one.examples), settings.examples)
    if count is None:
        return None
    return attack.why_not(settings.model, settings.known_recipe, observed_kind(updates[0]), count)


def _short(name: str) -> str:
    return name.rpartition(":")[2].rpartition(".")[2]

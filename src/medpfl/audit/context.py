"""What stands beside the numbers: data, assumptions, findings about the models, warnings of the defenses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medpfl.attacks.crafted import CraftedAttack
from medpfl.audit.entries import DataEntry
from medpfl.audit.grid import Cell
from medpfl.audit.materials import Materials
from medpfl.audit.spec import Spec
from medpfl.audit.targets import why_no_masks
from medpfl.audit.trained_models import model_kind
from medpfl.core.domain import CAPABILITIES
from medpfl.data import check_named
from medpfl.models import validate

ABOUT_SEARCHES = frozenset(
    {
        "parameters_per_pixel",
        "piecewise_linear_activations",
        "max_pooling",
        "last_layer_not_dense",
        "last_layer_without_bias",
    }
)
"""Codes of findings that concern attacks on the agreed model only."""

_ALWAYS = (
    ("Simulated clients", "The victims' updates were computed by MedPFL's own client step on the images given here."),
    ("What every adversary knows", "The model that was sent, the loss, image shape, number of classes, the kind of "
     "update, the number of examples and, unless withheld, the recipe."),
    ("Dropout", "Dropout layers are switched off in all forward passes, which helps the attacker."),
    ("Fixed attacks", "An adversary with better priors, more rounds or an attack that is not listed here may see more."),
)  # fmt: skip


def describe(spec: Spec, cells: Sequence[Cell], materials: Materials) -> dict[str, Any]:
    """Lists for `summary.json`: `data`, `assumptions`, `findings`, `warnings`."""
    return {
        "data": _data(spec, cells, materials),
        "assumptions": [{"title": title, "text": text} for title, text in (*_ALWAYS, *_specific(cells))],
        "findings": _findings(spec, cells, materials),
        "warnings": [
            *({"defense": entry.id, "text": text} for entry in spec.defenses for text in entry.defense.warnings()),
            *({"text": f"Channel {name}: {text}"} for name, text in _channel_warnings(cells)),
        ],
    }


def _channel_warnings(cells: Sequence[Cell]) -> dict[tuple[str, str], None]:
    """Id of a channel and what must stand beside its results, once each."""
    return {
        (cell.channel.id, text): None
        for cell in cells
        for text in cell.channel.channel.warnings(cell.recipe.recipe.private_images)
    }


def _data(spec: Spec, cells: Sequence[Cell], materials: Materials) -> list[dict[str, Any]]:
    used = {cell.dataset.id for cell in cells}
    described = []
    for entry in spec.data:
        for seed in spec.seeds if entry.id in used else ():
            pool = materials.pool(entry, seed)
            divided = pool.split
            described.append(
                {
                    "dataset": entry.id,
                    "seed": seed,
                    "images": len(pool.dataset),
                    "victims": len(divided.victims),
                    "bystanders": len(divided.bystanders),
                    "training": len(divided.training),
                    "auxiliary": len(divided.auxiliary),
                    "null": len(divided.null),
                    "near_duplicates": divided.near_duplicates,
                    "dropped_by_patient": divided.dropped_by_patient,
                    "notes": [*_differs_from_published(entry), *pool.dataset.notes, *divided.notes],
                }
            )
    return described + _borrowed(spec, cells, materials)


def _borrowed(spec: Spec, cells: Sequence[Cell], materials: Materials) -> list[dict[str, Any]]:
    """Data entries that are auxiliary knowledge, once for each data entry whose victims they stand beside."""
    pairs = {
        (cell.dataset.id, cell.threat_model.auxiliary): cell.dataset
        for cell in cells
        if cell.threat_model.auxiliary is not None
    }
    described = []
    for (attacked, other), entry in pairs.items():
        for seed in spec.seeds:
            source, borrowed = materials.borrowed(entry, other, seed)
            described.append(
                {
                    "dataset": other,
                    "seed": seed,
                    "images": len(source),
                    "victims": 0,
                    "bystanders": 0,
                    "training": 0,
                    "auxiliary": len(borrowed.indices),
                    "null": 0,
                    "near_duplicates": borrowed.near_duplicates,
                    "dropped_by_patient": borrowed.dropped_by_patient,
                    "notes": [
                        f"Auxiliary knowledge of adversaries who attack '{attacked}'.",
                        *source.notes,
                        *borrowed.notes,
                    ],
                }
            )
    return described


def _differs_from_published(entry: DataEntry) -> list[str]:
    """How the images differ from the published data set whose name the entry bears; empty for other names."""
    path = getattr(entry.reader, "path", None)
    return check_named(entry.name, path) if isinstance(path, Path) else []


def _specific(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    found = []
    if any(cell.recipe.recipe.private_images == 1 for cell in cells):
        found.append(
            ("One image per update", "Updates of single images are the easiest to invert; larger batches are harder.")
        )
    if any(cell.recipe.recipe.private_images > 1 for cell in cells):
        found.append(
            ("Balanced clients", "The images of a client take turns over the classes. Attacks that read one image per "
             "class find more in such batches than where one class prevails.")
        )  # fmt: skip
    if any(cell.model.state.startswith("untrained") for cell in cells):
        found.append(
            ("Untrained models", "Most published attacks work best early in training; later rounds may leak less.")
        )
    if any(cell.recipe.recipe.batch_norm == "eval" for cell in cells):
        found.append(
            ("Batch norm in eval mode", "Where a model has batch norm, clients used its running statistics: easier to "
             "invert than batch statistics.")
        )  # fmt: skip
    sent = {cell.attack.attack.sends: cell for cell in cells if isinstance(cell.attack.attack, CraftedAttack)}
    for what, cell in sent.items():
        found.append(
            (f"The server sent a crafted model ({cell.attack.name})", f"In place of the agreed model it sent {what}. It "
             "made this model once for each seed, from nothing but what the threat model grants: a client that trains "
             "whatever it receives takes part. An honest server sends no such model.")
        )  # fmt: skip
    chosen = {(cell.attack.name, word) for cell in cells for word in _taken(cell)}
    for name, word in sorted(chosen):
        found.append(
            (f"The server also chose what `{word}` grants ({name})", f"Beside the model it {CAPABILITIES[word]}, as far as "
             "that helps the attack; what clients were told is in each case's notes. Clients who pin what was agreed are "
             "not told anything else.")
        )  # fmt: skip
    for entry in {cell.channel.id: cell.channel for cell in cells}.values():
        if said := entry.channel.done():
            found.append((f"What the channel {entry.id} does", said))
    if any(cell.channel.channel.client_count > 1 for cell in cells):
        found.append(
            ("Secure aggregation", "Only the mean of all clients' updates arrives. The clients beside the victim hold as "
             "many images of other patients, and are the same ones whichever victim is attacked.")
        )  # fmt: skip
    if any(cell.oracle for cell in cells):
        found.append(("Oracles", "Cells marked `oracle` use knowledge that a real adversary would not have."))
    return found


def _taken(cell: Cell) -> frozenset[str]:
    """What a crafted attack changes beyond what it needs, as far as the threat model lets it."""
    attack = cell.attack.attack
    return attack.takes() & cell.threat_model.can if isinstance(attack, CraftedAttack) else frozenset()


def _about(cell: Cell) -> tuple[str, ...]:
    return *model_kind(cell), cell.recipe.id


def _findings(spec: Spec, cells: Sequence[Cell], materials: Materials) -> list[dict[str, Any]]:
    seen: dict[tuple[str, str, str], dict[str, Any]] = {}
    done: set[tuple[str, ...]] = set()
    for cell in cells:
        key = _about(cell)
        if key in done or why_no_masks(materials.dataset(cell.dataset), cell.model) is not None:
            continue
        done.add(key)
        if materials.why_no_model(cell, spec.seeds[0]) is not None:
            continue
        model = materials.initial_model(cell, spec.seeds[0], 0)
        honest = any(not isinstance(other.attack.attack, CraftedAttack) for other in cells if _about(other) == key)
        for finding in validate(model, cell.recipe.recipe, try_derivatives=False):
            if finding.code in ABOUT_SEARCHES and not honest:
                continue
            seen[(cell.model.id, finding.code, finding.message)] = {
                "model": cell.model.id,
                "severity": finding.severity,
                "code": finding.code,
                "message": finding.message,
            }
    return list(seen.values())

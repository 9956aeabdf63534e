"""Everything that is checked before any compute: data, models, refused cells, chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medpfl.attacks.crafted import why_no_room
from medpfl.attacks.front import why_no_front
from medpfl.audit.clients_needed import ClientsNeeded, clients_needed
from medpfl.audit.diagnosis import ALL, Change, extra_cells, sweep
from medpfl.audit.grid import Cell, cells, refusal
from medpfl.audit.identity import identity
from medpfl.audit.materials import Materials
from medpfl.audit.plan import Chunk, Plan, chunks
from medpfl.audit.rounds import as_sent, known_defense, known_recipe
from medpfl.audit.sizes import added_entries, bytes_per_added, round_bytes
from medpfl.audit.spec import Spec
from medpfl.audit.targets import why_no_masks
from medpfl.audit.trained_models import model_key
from medpfl.audit.utility import Measurement, measurements
from medpfl.core.functional import require_ssim_size
from medpfl.federation.recipes import check_recipe, has_batch_norm
from medpfl.models import validate

FEWEST_AUXILIARY = 2
"""Images that an attack which requires auxiliary ones is not run without."""


@dataclass(frozen=True)
class Prepared:
    """A spec whose data and models were loaded and whose cells were checked."""

    spec: Spec
    plan: Plan
    cells: tuple[Cell, ...]
    refusals: Mapping[str, str]
    chunks: tuple[Chunk, ...]
    materials: Materials
    clients_needed: Mapping[str, ClientsNeeded]
    data_fingerprints: Mapping[str, str]
    models: Mapping[str, Mapping[str, Any]]
    """What tells the models of the first seed from others, before any training here."""
    changes: tuple[Change, ...] = ()
    """How cells are changed to diagnose them."""
    utility: tuple[Measurement, ...] = ()
    """What is measured of the models that are trained under the cells' defenses."""

    @property
    def all_cells(self) -> list[Cell]:
        """The cells of the grid, then those that exist for their diagnosis only."""
        return [*self.cells, *extra_cells(self.changes)]

    @property
    def runnable(self) -> list[Cell]:
        """Cells that were not refused, with those of the diagnosis."""
        return [cell for cell in self.all_cells if cell.id not in self.refusals]

    @property
    def round_sizes(self) -> list[int]:
        """Bytes that one round of each of them takes for what a crafting server adds."""
        first = self.spec.seeds[0]
        return [round_bytes(cell, self.materials.initial_model(cell, first, 0)) for cell in self.runnable]


def prepare(spec: Spec, cache: Path, plan: Plan) -> Prepared:
    """Loads data and models and checks every cell; trains nothing. Raises InputError."""
    found = cells(spec)
    needed = clients_needed(found)
    materials = Materials(spec, cache, needed, plan.threads, plan.where)
    planned: list[Chunk] = []
    fingerprints: dict[str, str] = {}
    models: dict[str, Mapping[str, Any]] = {}
    for cell in found:
        require_ssim_size(tuple(materials.dataset(cell.dataset).images.shape[2:]))
        for seed in spec.seeds:
            fingerprints |= materials.data_fingerprints(cell, seed)
    refusals = _refusals(found, materials, spec.seeds[0])
    swept = (change for change in sweep(spec, found) if change.base not in refusals)
    changes = _telling(swept, materials, spec.seeds[0])
    extra = extra_cells(changes)
    refusals |= _refusals(extra, materials, spec.seeds[0])
    for cell in (*found, *extra):
        if cell.id in refusals:
            continue
        model = materials.initial_model(cell, spec.seeds[0], 0)
        planned += chunks(spec, cell, model, plan)
        key = model_key(cell, spec.seeds[0])
        if key not in models:
            models[key] = identity(model)
        if cell.model.state == "trained":
            for seed in spec.seeds:
                materials.training_images(cell.dataset, cell.model, seed)
    judged = [cell for cell in found if cell.id not in refusals and cell.guard.name == "none"]
    measured = measurements(judged, spec.utility, materials) if spec.utility is not None else ()
    return Prepared(
        spec, plan, tuple(found), refusals, tuple(planned), materials, needed, fingerprints, models, changes, measured
    )


def _refusals(cells: Iterable[Cell], materials: Materials, seed: int) -> dict[str, str]:
    reasons = {cell.id: refusal(cell) or _refused_by_model(cell, materials, seed) for cell in cells}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _telling(changes: Iterable[Change], materials: Materials, seed: int) -> tuple[Change, ...]:
    """Changes that can make a difference: not the mode of batch norm in a model without, nor "all" of a single one."""
    kept: list[Change] = []
    for change in changes:
        cell = change.cell
        single = change.name == ALL and sum(other.base == change.base for other in kept) < 2
        moot = change.name == "batch_norm_eval" and not has_batch_norm(materials.initial_model(cell, seed, 0))
        if not single and not moot:
            kept.append(change)
    return tuple(kept)


def _refused_by_model(cell: Cell, materials: Materials, seed: int) -> str | None:
    if (reason := why_no_masks(materials.dataset(cell.dataset), cell.model)) is not None:
        return reason
    if (reason := materials.why_no_model(cell, seed)) is not None:
        return reason
    model = materials.initial_model(cell, seed, 0)
    problems = check_recipe(cell.recipe.recipe, model, cell.defense.defense)
    if problems:
        return problems[0]
    findings = validate(model, cell.recipe.recipe, try_derivatives=False)
    refused = [finding.message for finding in findings if finding.severity == "refusal"]
    if refused:
        return refused[0]
    recipe, attack, clients = cell.recipe.recipe, cell.attack.attack, cell.channel.channel.client_count
    owned = materials.auxiliary(cell, seed)
    if "auxiliary" in attack.requires() and owned is not None and len(owned.images) < FEWEST_AUXILIARY:
        return (
            f"{cell.attack.name} needs auxiliary images and '{cell.dataset.id}' leaves {len(owned.images)} of them: "
            "take fewer victims or a smaller batch, give more images, or grant another data entry as `auxiliary: ID`"
        )
    seen = as_sent(cell, model)
    reason = attack.why_not(seen, known_recipe(cell), recipe.update, recipe.private_images * clients)
    known = known_defense(cell)
    if reason is None and known is not None:
        reason = attack.why_not_against(known, seen, known_recipe(cell), recipe.private_images * clients)
    if reason is None and "architecture" in attack.needs():
        reason = why_no_front(model)
    reason = reason or cell.guard.guard.why_not(model, recipe)
    if reason is not None:
        return reason
    what = f"what {cell.attack.name} sends to one of {clients} clients"
    return why_no_room(what, added_entries(cell, model), bytes_per_added(cell))

"""What a defense costs: for every setting of the grid a federation trained under it, and what it stands beside.

A setting is what the trained model depends on: data, model, recipe, channel (unless it is exact) and defense; attacks,
threat models and guards do not matter. Its runs differ in their seed only. Beside each stand the same federation
without defense, and every client's training alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from medpfl.audit.entries import DefenseEntry
from medpfl.audit.entry_parsing import PARSERS
from medpfl.audit.grid import Cell
from medpfl.audit.materials import Materials
from medpfl.audit.utility_settings import Utility
from medpfl.audit.validation import as_plain
from medpfl.core.devices import moved
from medpfl.core.domain import Batch
from medpfl.core.errors import SpecError
from medpfl.core.seeding import content_hash, derive_seed, generator
from medpfl.core.session import Session
from medpfl.data.splitting import patient_groups, strata_of
from medpfl.federation.channels import Channel, Plain
from medpfl.federation.federated import EXACT, federate, fitted, outputs
from medpfl.federation.partitions import Places, by_site, dirichlet, iid
from medpfl.federation.recipes import check_recipe
from medpfl.federation.secure import SecureSum
from medpfl.metrics.utility import classified
from medpfl.models.state import fingerprint

PROCEDURE = 1
"""Version of the procedure: results of another one are not mixed with these."""

What = Literal["defended", "alone"]


@dataclass(frozen=True)
class UtilityRun:
    """One federation to be trained and measured.

    key: identifies its content. cell: the id of a cell of this setting. what: the federation under the cell's defense,
    or one client (`client`) who trains alone without any. bare: without defense, whatever the cell has. seed: the
    number of the run.
    """

    key: str
    cell: str
    what: What
    seed: int
    bare: bool = False
    client: int | None = None

    @property
    def id(self) -> str:
        """Readable id."""
        return f"utility/{self.cell}/{self.what}{'' if self.client is None else self.client}{'-bare' * self.bare}/u{self.seed}"


@dataclass(frozen=True)
class Measurement:
    """The runs that say what one setting is worth, by seed, and those that it stands beside.

    refusal: why nothing is measured, None if something is.
    """

    setting: Mapping[str, Any]
    cells: tuple[str, ...]
    recipe: Mapping[str, Any]
    defended: tuple[UtilityRun, ...] = ()
    undefended: tuple[UtilityRun, ...] = ()
    alone: tuple[UtilityRun, ...] = ()
    clients: tuple[int, ...] = ()
    held_out: int = 0
    majority: float = 0.0
    notes: tuple[str, ...] = ()
    refusal: str | None = None

    @property
    def runs(self) -> tuple[UtilityRun, ...]:
        """All of them."""
        return (*self.defended, *self.undefended, *self.alone)

    def as_plain(self) -> dict[str, Any]:
        """For the store."""
        return asdict(self)


def measurements(cells: Sequence[Cell], utility: Utility, materials: Materials) -> tuple[Measurement, ...]:
    """What is to be measured for these cells, one entry per setting. Raises SpecError where the data is too little."""
    settings: dict[str, list[Cell]] = {}
    for cell in cells:
        settings.setdefault(content_hash(_setting(cell, utility)), []).append(cell)
    return tuple(_measurement(same, utility, materials) for same in settings.values())


def unique_runs(found: Sequence[Measurement]) -> tuple[UtilityRun, ...]:
    """Every run once, those of the federations before those of clients alone."""
    runs = [run for one in found for run in (*one.undefended, *one.defended)]
    runs += [run for one in found for run in one.alone]
    return tuple({run.key: run for run in runs}.values())


def measure(cell: Cell, run: UtilityRun, utility: Utility, materials: Materials, session: Session) -> dict[str, Any]:
    """Trains one federation (or one client alone) and measures its model on the held-out images."""
    started = time.perf_counter()
    cell = _bare(cell) if run.bare or run.what == "alone" else cell
    seed = _data_seed(run.seed, materials)
    pool, divided = materials.pool(cell.dataset, seed), _partition(cell, run.seed, utility, materials)
    dataset = pool.dataset
    holders = divided if run.client is None else [divided[run.client]]
    clients = [Batch(dataset.images[list(places)], dataset.targets[list(places)]) for places in holders]
    recipe = utility.recipe(cell.recipe.recipe)
    model = federate(
        moved(materials.initial_model(cell, _model_seed(run.seed, materials)), materials.device),
        moved(clients, materials.device),
        recipe,
        utility,
        partial(generator, "utility", run.seed, cell.dataset.id, cell.model.id, run.client),
        hooks=cell.defense.defense,
        channel=aggregation(cell.channel.channel) if run.what == "defended" else EXACT,
        session=session,
    )
    held_out = list(pool.split.null)
    found = outputs(model, dataset.images[held_out])
    groups = patient_groups(dataset)
    scored = classified(found.numpy(), dataset.targets[held_out].numpy(), [groups[place] for place in held_out])
    return {
        "values": dict(scored.values),
        "resampled": {name: [round(value, 5) for value in values] for name, values in scored.resampled.items()},
        "recalls": list(scored.recalls),
        "finite": bool(torch.isfinite(found).all()),
        "seconds": time.perf_counter() - started,
    }


def aggregation(channel: Channel) -> Channel:
    """How clients' updates become one: the cell's channel where it changes them, else the exact weighted mean."""
    exact = isinstance(channel, Plain) or (isinstance(channel, SecureSum) and channel.weighting == "examples")
    return EXACT if exact else channel


def _measurement(cells: Sequence[Cell], utility: Utility, materials: Materials) -> Measurement:
    cell = cells[0]
    recipe = utility.recipe(cell.recipe.recipe)
    shown = {
        **{axis: cell.entries[axis].id for axis in ("dataset", "model", "recipe", "channel", "defense")},
        "update": recipe.update,
    }
    found = Measurement(shown, tuple(one.id for one in cells), as_plain(recipe))
    if cell.model.segments:
        return replace(found, refusal="balanced accuracy and AUC are of classes of images, and this model segments")
    _check_held_out(cell, materials)
    parts = [_partition(cell, seed, utility, materials) for seed in range(utility.seeds)]
    model = materials.initial_model(cell, materials.spec.seeds[0])
    sizes = sorted({len(places) for places in parts[0]})
    problems = [
        problem for size in sizes for problem in check_recipe(fitted(recipe, size), model, cell.defense.defense)
    ]
    if problems:
        return replace(found, refusal=problems[0])
    bare = _bare(cell)
    runs = {
        what: tuple(_run(one, what, seed, utility, materials, bare=one is not cell) for seed in range(utility.seeds))
        for what, one in (("defended", cell), ("undefended", bare if cell.defense.name != "none" else cell))
    }
    alone = tuple(
        _run(bare, "alone", seed, utility, materials, client=client, bare=True)
        for seed, part in enumerate(parts)
        for client in range(len(part))
    )
    pool = materials.pool(cell.dataset, materials.spec.seeds[0])
    held_out = [strata_of(pool.dataset)[place] for place in pool.split.null]
    return replace(
        found,
        defended=tuple(replace(run, cell=cell.id) for run in runs["defended"]),
        undefended=tuple(replace(run, cell=cell.id) for run in runs["undefended"]),
        alone=tuple(replace(run, cell=cell.id) for run in alone),
        clients=tuple(len(places) for places in parts[0]),
        held_out=len(held_out),
        majority=max(held_out.count(name) for name in set(held_out)) / len(held_out),
        notes=tuple(_notes(cell, parts, materials)),
    )


def _setting(cell: Cell, utility: Utility) -> dict[str, Any]:
    """What the trained model depends on, as far as the spec tells."""
    channel = aggregation(cell.channel.channel)
    return {
        "procedure": PROCEDURE,
        "data": cell.dataset.id,
        "model": {**cell.model.params, "id": cell.model.id, "state": _state(cell)},
        "recipe": as_plain(utility.recipe(cell.recipe.recipe)),
        "defense": {"name": cell.defense.name, "params": cell.defense.params},
        "channel": None if channel is EXACT else {"name": cell.channel.name, "params": cell.channel.params},
        "federation": {key: value for key, value in as_plain(utility).items() if key != "seeds"},
    }


def _state(cell: Cell) -> Any:
    """The federation does the training: it starts from the weights before any training here."""
    state = cell.model.params.get("state")
    return "untrained" if cell.model.state in ("trained", "untrained_per_victim") else state


def _run(
    cell: Cell,
    what: str,
    seed: int,
    utility: Utility,
    materials: Materials,
    client: int | None = None,
    bare: bool = False,
) -> UtilityRun:
    kind: What = "alone" if what == "alone" else "defended"
    setting = _setting(cell, utility)
    if kind == "alone":
        setting["channel"] = None
    content = {
        **setting,
        "images": materials.pool(cell.dataset, _data_seed(seed, materials)).fingerprint,
        "initial": fingerprint(materials.initial_model(cell, _model_seed(seed, materials))),
        "what": kind,
        "client": client,
        "seed": [seed, _data_seed(seed, materials)],
    }
    return UtilityRun(content_hash(content), cell.id, kind, seed, bare, client)


def _bare(cell: Cell) -> Cell:
    """The same cell without defense."""
    entry = PARSERS["defense"]({"name": "none"}, "defenses", Path())
    assert isinstance(entry, DefenseEntry)  # what this parser gives
    return replace(cell, defense=entry)


def _data_seed(seed: int, materials: Materials) -> int:
    """The audit's own seeds take turns: each divides the images in its own way."""
    seeds = materials.spec.seeds
    return seeds[seed % len(seeds)]


def _model_seed(seed: int, materials: Materials) -> int:
    """New initial weights for each run: those of the audit as far as it has seeds."""
    seeds = materials.spec.seeds
    return seeds[seed] if seed < len(seeds) else derive_seed("utility model", seeds[0], seed)


def _partition(cell: Cell, seed: int, utility: Utility, materials: Materials) -> Places:
    """For each client the places of its images in the data set."""
    pool = materials.pool(cell.dataset, _data_seed(seed, materials))
    training, dataset = pool.split.training, pool.dataset
    if utility.partition != "site" and len(training) < utility.clients:
        raise SpecError(
            f"utility: '{cell.dataset.id}' leaves {len(training)} images to train on and clients: {utility.clients} need "
            "one each; use fewer victims or clients, or more images"
        )
    groups, strata = patient_groups(dataset), strata_of(dataset)
    names, classes = [groups[place] for place in training], [strata[place] for place in training]
    stream = generator("utility partition", seed, cell.dataset.id)
    if utility.partition == "site":
        places = by_site([dataset.sites[place] if dataset.sites else None for place in training])
    elif utility.partition == "dirichlet":
        places = dirichlet(names, classes, utility.clients, utility.concentration, stream)
    else:
        places = iid(names, classes, utility.clients, stream)
    if not all(places):
        patients = len(set(names))
        raise SpecError(
            f"utility: '{cell.dataset.id}' leaves images of {patients} patients to train on and clients: {utility.clients} "
            "need one each; use fewer victims or clients, or more patients"
        )
    return tuple(tuple(training[place] for place in own) for own in places)


def _check_held_out(cell: Cell, materials: Materials) -> None:
    """Raises SpecError where training or held-out images lack a class, so that nothing could be measured."""
    for seed in materials.spec.seeds:
        pool = materials.pool(cell.dataset, seed)
        targets, names = pool.dataset.targets, pool.dataset.class_names
        for part, indices in (("train on", pool.split.training), ("hold out", pool.split.null)):
            if not indices:
                raise SpecError(
                    f"utility: '{cell.dataset.id}' leaves no images to {part}; use fewer victims or more images"
                )
            own = targets[list(indices)]
            held = own.sum(dim=0) > 0 if own.is_floating_point() else torch.bincount(own, minlength=len(names)) > 0
            missing = [name for name, there in zip(names, held.tolist(), strict=False) if not there]
            if missing or len(names) < 2:
                what = f"no image of class '{missing[0]}'" if missing else "images of one class only"
                raise SpecError(
                    f"utility: '{cell.dataset.id}' leaves {what} among {len(indices)} images to {part}, so a classifier "
                    "cannot be judged; use fewer victims, more images, or leave utility out"
                )


def _notes(cell: Cell, parts: Sequence[Places], materials: Materials) -> list[str]:
    """What must be read with the numbers of this partition."""
    dataset = materials.dataset(cell.dataset)
    strata = strata_of(dataset)
    notes = []
    for number, places in enumerate(parts[0]):
        held = {strata[place] for place in places}
        if len(held) == 1:
            name = dataset.class_names[min(held)] if min(held) < len(dataset.class_names) else "none"
            notes.append(
                f"Client {number + 1} of {len(parts[0])} holds images of one class only ('{name}'): alone it learns no other."
            )
    if cell.model.state == "trained":
        notes.append("The federation starts from the weights before training: it is what trains them here.")
    return notes

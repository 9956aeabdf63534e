"""What an audit's folder was started with: plan, data, models and cells, which a later run may add to and not change."""

from __future__ import annotations

from medpfl.audit.diagnosis import is_extra
from medpfl.audit.entries import AXES
from medpfl.audit.identity import is_same
from medpfl.audit.plan import Plan
from medpfl.audit.preparation import Prepared
from medpfl.audit.spec import Diagnose, Spec
from medpfl.audit.store import Store, StoredCell
from medpfl.audit.tables import now
from medpfl.audit.utility_settings import Utility
from medpfl.audit.validation import as_plain
from medpfl.core.errors import StoreError


def kept_plan(store: Store, current: Plan) -> Plan:
    """The plan that the folder was started under. Raises StoreError if this one differs."""
    stored = store.get("plan")
    if stored is None:
        store.set("plan", current.as_plain())
        store.set("created", now())
        return current
    if stored != current.as_plain():
        changed = ", ".join(
            f"{key} {stored.get(key)} -> {value}"
            for key, value in current.as_plain().items()
            if stored.get(key) != value
        )
        raise StoreError(
            f"{store.folder}: was started under another plan ({changed}), so new results would not fit the old ones; use another --out"
        )
    return current


def still_diagnosed(store: Store, spec: Spec) -> Spec:
    """An audit that was diagnosed once stays so, also where the command does not ask for it again."""
    stored = store.get("diagnose")
    if stored is None:
        return spec
    if spec.diagnose is not None and spec.diagnose.victims != stored["victims"]:
        raise StoreError(
            f"{store.folder}: its cells are diagnosed with diagnose: {{victims: {stored['victims']}}}, "
            f"found {spec.diagnose.victims}; use another --out, or take the change back"
        )
    return spec.diagnosed(Diagnose(**stored))


def still_measured(store: Store, spec: Spec) -> Spec:
    """An audit whose utility was measured once keeps it, also where the command does not ask for it again.

    More seeds are added to those that are there. Raises StoreError for other settings.
    """
    stored = store.get("utility")
    if stored is None:
        return spec
    if spec.utility is None:
        return spec.with_utility(Utility(**stored))
    found = as_plain(spec.utility)
    changed = [key for key in found if key != "seeds" and stored.get(key) != found[key]]
    changed += ["seeds"] if found["seeds"] < stored["seeds"] else []
    if changed:
        key = changed[0]
        raise StoreError(
            f"{store.folder}: its utility was measured with {key}: {stored.get(key)}, found {found[key]}; "
            "use another --out, or take the change back"
        )
    return spec


def register(store: Store, prepared: Prepared) -> None:
    """Stores new cells and chunks; refuses a spec that is not the stored one plus new cells."""
    general = {
        "name": prepared.spec.name,
        "seeds": list(prepared.spec.seeds),
        "success_threshold": prepared.spec.success_threshold,
        "limit": str(prepared.spec.limit) if prepared.spec.limit else None,
    }
    way_out = "use another --out, or take the change back"
    stored_general = store.get("general")
    if stored_general is not None and stored_general != general:
        key = next(key for key in general if stored_general.get(key) != general[key])
        raise StoreError(
            f"{store.folder}: belongs to another spec ('{key}' was {stored_general.get(key)!r}, now {general[key]!r}); {way_out}"
        )
    stored = {cell.cell: cell for cell in store.cells()}
    current = {cell.id: cell for cell in prepared.all_cells}
    replaced = [name for name in stored if is_extra(name) and name not in current]
    for name, old in stored.items():
        if name in replaced:
            continue
        if name not in current:
            raise StoreError(f"{store.folder}: belongs to another spec (the cell {name} is gone); {way_out}")
        if current[name].fingerprint != old.fingerprint:
            raise StoreError(f"{store.folder}: belongs to another spec (the cell {name} has other settings); {way_out}")
    fingerprints = store.get("data") or {}
    for key, fingerprint in fingerprints.items():
        if prepared.data_fingerprints.get(key, fingerprint) != fingerprint:
            raise StoreError(
                f"{store.folder}: the images or the division of {key} are not those that the audit was started with "
                f"(changed files, or a recipe that needs more images per victim); {way_out}"
            )
    models = store.get("models") or {}
    for key, stored_model in models.items():
        if key in prepared.models and not is_same(stored_model, prepared.models[key]):
            raise StoreError(
                f"{store.folder}: the model {key} is not the one that the audit was started with "
                f"(another checkpoint file, or code that makes another model); {way_out}"
            )
    new = [
        StoredCell(
            cell.id,
            cell.fingerprint,
            {
                **{axis: cell.entries[axis].id for axis in AXES},
                **{f"{axis}_params": {"name": entry.name, **entry.params} for axis, entry in cell.entries.items()},
                "oracle": cell.oracle,
                "adaptive": cell.adaptive,
            },
            prepared.refusals.get(cell.id),
        )
        for name, cell in current.items()
        if name not in stored
    ]
    names = {cell.cell for cell in new}
    store.remove_cells(replaced)
    store.add_cells(new, [chunk for chunk in prepared.chunks if chunk.cell in names], list(current))
    if prepared.spec.diagnose is not None:
        store.set("diagnose", as_plain(prepared.spec.diagnose))
        changes = [{"cell": one.base, "change": one.name, "changed": one.cell.id} for one in prepared.changes]
        store.set("changes", changes)
    if prepared.spec.utility is not None:
        store.set("utility", as_plain(prepared.spec.utility))
        store.set("measurements", [one.as_plain() for one in prepared.utility])
    store.set("general", general)
    store.set("data", {**fingerprints, **prepared.data_fingerprints})
    store.set("models", {**prepared.models, **models})

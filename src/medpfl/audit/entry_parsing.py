"""Reads one entry of a spec's axis from plain values, as YAML gives them. All raise SpecError."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from medpfl.attacks import ATTACKS
from medpfl.attacks.base import Attack
from medpfl.audit.compositions import composition
from medpfl.audit.entries import (
    AXES,
    AttackEntry,
    ChannelEntry,
    DataEntry,
    DataSettings,
    DefenseEntry,
    Entry,
    GuardEntry,
    ModelEntry,
    RecipeEntry,
    ThreatModelEntry,
)
from medpfl.audit.threat_models import THREAT_MODELS
from medpfl.audit.validation import as_plain, build, field_names
from medpfl.core.domain import CAPABILITIES, KNOWLEDGE, Recipe
from medpfl.core.errors import SpecError, suggestion
from medpfl.data import READERS, resolve_path
from medpfl.defenses import DEFENSES
from medpfl.federation.channels import CHANNELS
from medpfl.federation.training import TrainingConfig
from medpfl.guards import GUARDS
from medpfl.models import MODELS, SEGMENTATION, Normalization

_COMMON = ("name", "label", "only")
DATA_PATHS = ("path", "mask_path")
"""Keys of a data entry that name files or folders, relative to the spec."""
_MODEL_KEYS = ("factory", "state", "normalize", "classes", "task")
TASKS = ("classification", "segmentation")
"""What a model is trained for; by default segmentation for the zoo's own such models, else classification."""
_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")


def _common(raw: Mapping[str, Any], axis: str, where: str, default_id: str) -> dict[str, Any]:
    """Id and `only` of an entry, checked."""
    for key in ("label", "name"):
        if raw.get(key) is not None and not isinstance(raw[key], str):
            raise SpecError(f"{where}.{key}: expected text, found {raw[key]!r}")
    label = raw.get("label")
    identifier = label if label is not None else default_id
    if not _SAFE_ID.fullmatch(identifier):
        raise SpecError(
            f"{where}: '{identifier}' cannot be an id; use a label of ASCII letters, digits, '.', '_' and '-' (60 at most)"
        )
    only = raw.get("only", {})
    if not isinstance(only, dict):
        raise SpecError(f"{where}.only: expected a mapping such as {{model: [lenet_dlg]}}, found {only!r}")
    checked: dict[str, tuple[str, ...]] = {}
    for other, values in only.items():
        if other not in AXES:
            raise SpecError(f"{where}.only: unknown axis '{other}': {suggestion(str(other), AXES)}")
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise SpecError(f"{where}.only.{other}: expected a list of ids or names, found {values!r}")
        checked[other] = tuple(values)
    return {"axis": axis, "id": identifier, "only": checked}


def _name(raw: Mapping[str, Any], where: str) -> str:
    name = raw.get("name")
    if not isinstance(name, str):
        raise SpecError(
            f"{where}: missing key 'name'" if name is None else f"{where}.name: expected text, found {name!r}"
        )
    return name


def _rest(raw: Mapping[str, Any], *taken: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in (*_COMMON, *taken)}


def data_entry(raw: Mapping[str, Any], where: str, base: Path) -> DataEntry:
    reader_name = raw.get("reader")
    if reader_name is None:
        raise SpecError(f"{where}: missing key 'reader' (one of {', '.join(READERS.names())})")
    if not isinstance(reader_name, str):
        raise SpecError(f"{where}.reader: expected one of {', '.join(READERS.names())}, found {reader_name!r}")
    reader_class = _lookup(READERS, reader_name, f"{where}.reader")
    settings_keys = field_names(DataSettings)
    reader_keys = field_names(reader_class)
    values = _rest(raw, "reader")
    known = (*settings_keys, *reader_keys, *_COMMON)
    for key in values:
        if key not in known:
            raise SpecError(f"{where}: unknown key '{key}': {suggestion(str(key), known)}")
    settings = build(DataSettings, {key: value for key, value in values.items() if key in settings_keys}, where)
    reader_values = {key: value for key, value in values.items() if key not in settings_keys}
    plain_reader = dict(reader_values)
    for key in DATA_PATHS:
        if key in reader_keys and reader_values.get(key) is not None:
            if not isinstance(reader_values[key], str):
                raise SpecError(f"{where}.{key}: expected text, found {reader_values[key]!r}")
            reader_values[key] = resolve_path(reader_values[key], base)
    reader = build(reader_class, reader_values, where, (*settings_keys, *_COMMON))
    name = raw.get("name") or reader_name
    params = {"reader": reader_name, **as_plain(reader), **plain_reader, **as_plain(settings)}
    return DataEntry(**_common(raw, "dataset", where, name), name=name, params=params, reader=reader, settings=settings)


def _lookup(registry: Any, name: str, where: str) -> Any:
    try:
        return registry[name].item
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def model_entry(raw: Mapping[str, Any], where: str, base: Path) -> ModelEntry:
    values = _rest(raw, *_MODEL_KEYS)
    for key in values:
        raise SpecError(f"{where}: unknown key '{key}': {suggestion(str(key), (*_COMMON, *_MODEL_KEYS))}")
    factory = raw.get("factory")
    if factory is not None:
        if not isinstance(factory, str) or not _FACTORY.fullmatch(factory):
            raise SpecError(f"{where}.factory: expected 'package.module:callable', found {factory!r}")
        source = factory
        name = raw.get("name") or factory.rpartition(":")[2]
    else:
        name = _name(raw, where)
        _lookup(MODELS, name, where)
        source = name
    classes = raw.get("classes")
    if classes is not None and (not isinstance(classes, int) or isinstance(classes, bool) or classes < 2):
        raise SpecError(f"{where}.classes: expected a whole number from 2, found {classes!r}")
    task = raw.get("task")
    if task is not None and task not in TASKS:
        raise SpecError(f"{where}.task: expected {' or '.join(TASKS)}, found {task!r}")
    normalize = raw.get("normalize")
    if normalize is not None and not isinstance(normalize, dict):
        raise SpecError(f"{where}.normalize: expected {{mean: [...], std: [...]}}, found {normalize!r}")
    normalization = build(Normalization, normalize, f"{where}.normalize") if normalize is not None else None
    given = raw.get("state", "untrained")
    state, training, checkpoint = _state(given, f"{where}.state", base)
    params = {
        "source": source,
        "state": {"trained": as_plain(training)}
        if training is not None
        else given
        if checkpoint is not None
        else state,
        "normalize": normalize,
        "classes": classes,
        **({"task": task} if task is not None else {}),
    }
    return ModelEntry(
        **_common(raw, "model", where, name),
        name=name,
        params=params,
        source=source,
        state=state,
        training=training,
        checkpoint=checkpoint,
        normalize=normalization,
        classes=classes,
        segments=name in SEGMENTATION if task is None else task == "segmentation",
    )


def _state(value: Any, where: str, base: Path) -> tuple[Any, TrainingConfig | None, Path | None]:
    if isinstance(value, dict):
        if set(value) != {"trained"} or not isinstance(value["trained"], dict):
            raise SpecError(f"{where}: expected {{trained: {{epochs: 5}}}}, found {value!r}")
        training = build(TrainingConfig, value["trained"], f"{where}.trained")
        return ("untrained", None, None) if training.length == 0 else ("trained", training, None)
    if not isinstance(value, str):
        raise SpecError(
            f"{where}: expected untrained, untrained_per_victim, imagenet, {{trained: ...}} or a path, found {value!r}"
        )
    if value in ("untrained", "untrained_per_victim", "imagenet"):
        return value, None, None
    path = resolve_path(value, base) if re.search(r"[./\\:]", value) else None
    if path is None:
        raise SpecError(
            f"{where}: unknown state '{value}': "
            + suggestion(value, ("untrained", "untrained_per_victim", "imagenet", "trained"))
            + "; a checkpoint is a path such as ./model.safetensors"
        )
    return "checkpoint", None, path


def recipe_entry(raw: Mapping[str, Any], where: str, _base: Path) -> RecipeEntry:
    recipe = build(Recipe, _rest(raw), where, _COMMON)
    name = raw.get("name") or recipe.default_id
    return RecipeEntry(**_common(raw, "recipe", where, name), name=name, params=as_plain(recipe), recipe=recipe)


def threat_model_entry(raw: Mapping[str, Any], where: str, _base: Path) -> ThreatModelEntry:
    name = _name(raw, where)
    threat_model = _lookup(THREAT_MODELS, name, where)
    values = _rest(raw)
    for key in values:
        if key not in ("can", "knows", "withhold"):
            raise SpecError(
                f"{where}: unknown key '{key}': {suggestion(str(key), ('can', 'knows', 'withhold', *_COMMON))}"
            )
    can = _words(values.get("can") or [], CAPABILITIES, f"{where}.can")
    if not can <= threat_model.capabilities:
        raise SpecError(f"{where}.can: {name} cannot change anything; use malicious_server")
    auxiliary: str | None = None
    knows: set[str] = set()
    listed = values.get("knows") or []
    for item in listed if isinstance(listed, list) else [listed]:
        if isinstance(item, dict) and set(item) == {"auxiliary"} and isinstance(item["auxiliary"], str):
            auxiliary = item["auxiliary"]
            knows.add("auxiliary")
        else:
            knows |= _words([item], KNOWLEDGE, f"{where}.knows")
    withhold = _words(values.get("withhold") or [], ("recipe",), f"{where}.withhold")
    return ThreatModelEntry(
        **_common(raw, "threat_model", where, name),
        name=name,
        params=threat_model_params(can, knows, withhold, auxiliary),
        can=can,
        knows=frozenset(knows),
        withhold=withhold,
        auxiliary=auxiliary,
    )


def threat_model_params(can: Set[str], knows: Set[str], withhold: Set[str], auxiliary: str | None) -> dict[str, Any]:
    """A threat model as plain values."""
    borrowed = [{"auxiliary": auxiliary}] if auxiliary else []
    return {
        "can": sorted(can),
        "knows": [*sorted(knows - ({"auxiliary"} if auxiliary else set())), *borrowed],
        "withhold": sorted(withhold),
    }


def _words(values: Any, known: Any, where: str) -> frozenset[str]:
    if not isinstance(values, list):
        raise SpecError(f"{where}: expected a list, found {values!r}")
    for value in values:
        if not isinstance(value, str) or value not in known:
            raise SpecError(f"{where}: unknown '{value}': {suggestion(str(value), known)}")
    return frozenset(values)


def _made(raw: Mapping[str, Any], where: str, registry: Any, *known: str) -> tuple[str, dict[str, Any], Any]:
    """Name, settings and what has them, of an entry that is all configuration."""
    name = _name(raw, where)
    made = build(_lookup(registry, name, where), _rest(raw), where, (*known, *_COMMON))
    return name, as_plain(made), made


def channel_entry(raw: Mapping[str, Any], where: str, _base: Path) -> ChannelEntry:
    name, params, channel = _made(raw, where, CHANNELS)
    return ChannelEntry(**_common(raw, "channel", where, name), name=name, params=params, channel=channel)


def defense_entry(raw: Mapping[str, Any], where: str, _base: Path) -> DefenseEntry:
    name, params, defense = composition(raw, where, _defense) if "compose" in raw else _defense(raw, where)
    return DefenseEntry(**_common(raw, "defense", where, name), name=name, params=params, defense=defense)


def _defense(raw: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any], Any]:
    return _made(raw, where, DEFENSES, "compose")


def guard_entry(raw: Mapping[str, Any], where: str, _base: Path) -> GuardEntry:
    name, params, guard = _made(raw, where, GUARDS)
    return GuardEntry(**_common(raw, "guard", where, name), name=name, params=params, guard=guard)


def attack_entry(raw: Mapping[str, Any], where: str, _base: Path) -> AttackEntry:
    name = _name(raw, where)
    attack_class: type[Attack] = _lookup(ATTACKS, name, where)
    values = _rest(raw, "preset")
    preset = raw.get("preset")
    if preset is not None:
        if not isinstance(preset, str) or preset not in attack_class.presets:
            raise SpecError(
                f"{where}.preset: unknown preset '{preset}': {suggestion(str(preset), attack_class.presets)}"
            )
        values = {**attack_class.presets[preset], **values}
    attack = build(attack_class, values, where, (*_COMMON, "preset"))
    return AttackEntry(**_common(raw, "attack", where, name), name=name, params=as_plain(attack), attack=attack)


PARSERS: Mapping[str, Callable[[Mapping[str, Any], str, Path], Entry]] = {
    "dataset": data_entry,
    "model": model_entry,
    "recipe": recipe_entry,
    "threat_model": threat_model_entry,
    "channel": channel_entry,
    "defense": defense_entry,
    "guard": guard_entry,
    "attack": attack_entry,
}
"""Axis name -> what reads one of its entries: plain values, their place for messages, the folder of the spec."""

"""The audit spec: axes of entries, read from YAML or built from Python objects."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass as config_dataclass

from medpfl.attacks import ATTACKS
from medpfl.attacks.base import Attack
from medpfl.audit.limits import Limit, parse_limit
from medpfl.audit.threat_models import CAPABILITIES, THREAT_MODELS
from medpfl.audit.validation import as_plain, build, field_names
from medpfl.core.config import STRICT
from medpfl.core.domain import KNOWLEDGE, Recipe
from medpfl.core.errors import SpecError, suggestion
from medpfl.data import READERS, Reader, resolve_path
from medpfl.defenses import DEFENSES, Defense
from medpfl.federation.channels import CHANNELS, Channel
from medpfl.federation.training import TrainingConfig
from medpfl.models import MODELS, Normalization

AXES = ("dataset", "model", "recipe", "threat_model", "channel", "defense", "guard", "attack")
"""Axis names as in the columns of the result tables."""

SPEC_KEYS = {
    "dataset": "data",
    "model": "models",
    "recipe": "recipes",
    "threat_model": "threat_models",
    "channel": "channels",
    "defense": "defenses",
    "guard": "guards",
    "attack": "attacks",
}
"""Axis name -> key in the spec."""

_OTHER_KEYS = (
    "name",
    "seed",
    "seeds",
    "utility",
    "diagnose",
    "limit",
    "success_threshold",
    "environment",
)
_COMMON = ("name", "label", "only")
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")


@dataclass(frozen=True)
class Entry:
    """One value of one axis. `params` are its settings as plain values; equal params mean equal results."""

    axis: str
    name: str
    id: str
    only: Mapping[str, tuple[str, ...]]
    params: Mapping[str, Any]


@config_dataclass(frozen=True, kw_only=True, config=STRICT)
class DataSettings:
    """How images enter the audit, whatever the reader."""

    size: Annotated[int | tuple[int, ...], Field(description="height and width (or one number for both), pixels")] = 32
    channels: Annotated[Literal[1, 3], Field(description="1 (grey) or 3 (RGB)")] = 1
    aspect: Annotated[
        Literal["squash", "crop", "pad"], Field(description="how other aspects become the given size")
    ] = "squash"
    victims: Annotated[int, Field(ge=0, description="clients that are attacked")] = 8
    maximum: Annotated[int | None, Field(ge=1, description="read at most so many images")] = None
    near_duplicates: Annotated[
        float, Field(gt=0, le=1, description="thumbnail correlation above which a pool image is left out")
    ] = 0.95


@dataclass(frozen=True)
class DataEntry(Entry):
    """Images: a reader and how its images are brought to one size."""

    reader: Reader
    settings: DataSettings


@dataclass(frozen=True)
class ModelEntry(Entry):
    """A model and the state in which it is attacked."""

    source: str
    state: Literal["untrained", "untrained_per_victim", "imagenet", "trained", "checkpoint"]
    training: TrainingConfig | None
    checkpoint: Path | None
    normalize: Normalization | None
    classes: int | None


@dataclass(frozen=True)
class RecipeEntry(Entry):
    """How clients train."""

    recipe: Recipe


@dataclass(frozen=True)
class ThreatModelEntry(Entry):
    """Who listens, what it may change, what it knows beyond what every adversary knows."""

    can: frozenset[str]
    knows: frozenset[str]
    withhold: frozenset[str]
    auxiliary: str | None


@dataclass(frozen=True)
class ChannelEntry(Entry):
    """What lies between clients and server."""

    channel: Channel


@dataclass(frozen=True)
class DefenseEntry(Entry):
    """What the client changes."""

    defense: Defense


@dataclass(frozen=True)
class GuardEntry(Entry):
    """A client's check that can stop a round; `none` until guards are given."""


@dataclass(frozen=True)
class AttackEntry(Entry):
    """What the adversary does with its observation."""

    attack: Attack


@dataclass(frozen=True)
class Spec:
    """A validated audit spec. `plain` is what was given, `base` the folder that its paths are relative to."""

    name: str
    seeds: tuple[int, ...]
    data: tuple[DataEntry, ...]
    models: tuple[ModelEntry, ...]
    recipes: tuple[RecipeEntry, ...]
    threat_models: tuple[ThreatModelEntry, ...]
    channels: tuple[ChannelEntry, ...]
    defenses: tuple[DefenseEntry, ...]
    guards: tuple[GuardEntry, ...]
    attacks: tuple[AttackEntry, ...]
    limit: Limit | None
    success_threshold: float
    plain: Mapping[str, Any]
    base: Path
    axes: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)

    def entry(self, axis: str, identifier: str) -> Entry:
        """The entry of an axis with that id."""
        return next(entry for entry in self.axes[axis] if entry.id == identifier)


def load_spec(path: Path) -> Spec:
    """Reads a YAML spec; its paths are relative to its folder. Raises SpecError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file; `medpfl init` writes a spec") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read as text ({error})") from None
    try:
        plain = yaml.safe_load(text)
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise SpecError(f"{path}: not valid YAML: {detail}") from None
    if not isinstance(plain, dict):
        raise SpecError(
            f"{path}: expected a mapping with `data`, `models`, `attacks`, ..., found {type(plain).__name__}"
        )
    return parse_spec(plain, base=path.parent)


def parse_spec(plain: Mapping[str, Any], base: Path) -> Spec:
    """Validates a spec given as plain values, as YAML gives them. Raises SpecError."""
    known = (*SPEC_KEYS.values(), *_OTHER_KEYS)
    for key in plain:
        if key not in known:
            raise SpecError(f"unknown key '{key}': {suggestion(str(key), known)}")
    if plain.get("utility"):
        raise SpecError("utility: this version does not measure utility yet; take the key out")
    if plain.get("diagnose"):
        raise SpecError("diagnose: this version has no diagnosis sweep yet; take the key out")
    readers = {
        "dataset": _data_entry,
        "model": _model_entry,
        "recipe": _recipe_entry,
        "threat_model": _threat_model_entry,
        "channel": _channel_entry,
        "defense": _defense_entry,
        "guard": _guard_entry,
        "attack": _attack_entry,
    }
    axes: dict[str, tuple[Any, ...]] = {}
    for axis, key in SPEC_KEYS.items():
        raw_entries = _raw_entries(plain, key)
        entries = [readers[axis](raw, f"{key}[{index}]", base) for index, raw in enumerate(raw_entries)]
        _check_unique(entries, key)
        axes[axis] = tuple(entries)
    _check_only(axes)
    _check_auxiliary(axes)
    limit = parse_limit(_typed(plain, "limit", str, None), "limit") if plain.get("limit") is not None else None
    threshold = _typed(plain, "success_threshold", (int, float), 0.9)
    if not 0 < threshold <= 1:
        raise SpecError(f"success_threshold: expected a number in (0, 1], found {threshold}")
    name = _typed(plain, "name", str, "audit")
    return Spec(
        name=name,
        seeds=_seeds(plain),
        data=axes["dataset"],
        models=axes["model"],
        recipes=axes["recipe"],
        threat_models=axes["threat_model"],
        channels=axes["channel"],
        defenses=axes["defense"],
        guards=axes["guard"],
        attacks=axes["attack"],
        limit=limit,
        success_threshold=float(threshold),
        plain=dict(plain),
        base=base,
        axes=axes,
    )


_DEFAULTS: Mapping[str, list[dict[str, Any]]] = {
    "models": [{"name": "lenet_dlg"}],
    "recipes": [{}],
    "threat_models": [{"name": "honest_server"}],
    "channels": [{"name": "plain"}],
    "defenses": [{"name": "none"}],
    "guards": [{"name": "none"}],
    "attacks": [{"name": "cpl"}],
}


def _raw_entries(plain: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = plain.get(key)
    if value is None or (key == "guards" and value == []):
        if key not in _DEFAULTS:
            raise SpecError(
                f"missing key '{key}': give at least one entry, for instance {{reader: phantom, name: phantom}}"
            )
        return list(_DEFAULTS[key])
    if not isinstance(value, list) or not value:
        raise SpecError(f"{key}: expected a list with at least one entry, found {value!r}")
    entries = [{"name": item} if isinstance(item, str) and key != "recipes" else item for item in value]
    for index, item in enumerate(entries):
        if not isinstance(item, dict):
            raise SpecError(f"{key}[{index}]: expected a mapping such as {{name: ...}}, found {item!r}")
    return entries


def _seeds(plain: Mapping[str, Any]) -> tuple[int, ...]:
    if "seed" in plain and "seeds" in plain:
        raise SpecError("seed and seeds: give one of them")
    seeds = plain.get("seeds", [plain.get("seed", 0)])
    whole = (
        isinstance(seeds, list)
        and seeds
        and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds)
    )
    if not whole:
        raise SpecError(f"seeds: expected whole numbers from 0, found {seeds!r}")
    if len(set(seeds)) != len(seeds):
        raise SpecError(f"seeds: each seed once, found {seeds!r}")
    return tuple(seeds)


def _typed(plain: Mapping[str, Any], key: str, kind: Any, default: Any) -> Any:
    value = plain.get(key, default)
    if value is not default and (not isinstance(value, kind) or isinstance(value, bool)):
        raise SpecError(f"{key}: expected {getattr(kind, '__name__', 'a number')}, found {value!r}")
    return value


def _common(raw: Mapping[str, Any], axis: str, where: str, default_id: str) -> dict[str, Any]:
    """Id and `only` of an entry, checked."""
    label = raw.get("label")
    if label is not None and not isinstance(label, str):
        raise SpecError(f"{where}.label: expected text, found {label!r}")
    identifier = label if label is not None else default_id
    if not _SAFE_ID.fullmatch(identifier):
        raise SpecError(
            f"{where}: '{identifier}' cannot be an id; use a label of letters, digits, '.', '_' and '-' (60 at most)"
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


def _data_entry(raw: Mapping[str, Any], where: str, base: Path) -> DataEntry:
    reader_name = raw.get("reader")
    if not isinstance(reader_name, str):
        raise SpecError(f"{where}: missing key 'reader' (one of {', '.join(READERS.names())})")
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
    if "path" in reader_keys and "path" in reader_values:
        if not isinstance(reader_values["path"], str):
            raise SpecError(f"{where}.path: expected text, found {reader_values['path']!r}")
        reader_values["path"] = resolve_path(reader_values["path"], base)
    reader = build(reader_class, reader_values, where, settings_keys_hint(settings_keys))
    name = raw.get("name", reader_name)
    if not isinstance(name, str):
        raise SpecError(f"{where}.name: expected text, found {name!r}")
    params = {"reader": reader_name, **as_plain(reader), **plain_reader, **as_plain(settings)}
    return DataEntry(**_common(raw, "dataset", where, name), name=name, params=params, reader=reader, settings=settings)


def settings_keys_hint(keys: Sequence[str]) -> tuple[str, ...]:
    """Keys that are valid in a data entry whatever the reader, for suggestions."""
    return (*keys, *_COMMON)


def _lookup(registry: Any, name: str, where: str) -> Any:
    try:
        return registry[name].item
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def _model_entry(raw: Mapping[str, Any], where: str, base: Path) -> ModelEntry:
    values = _rest(raw, "factory", "state", "normalize", "classes")
    for key in values:
        raise SpecError(
            f"{where}: unknown key '{key}': {suggestion(str(key), (*_COMMON, 'factory', 'state', 'normalize', 'classes'))}"
        )
    factory = raw.get("factory")
    if factory is not None:
        if not isinstance(factory, str) or not re.fullmatch(r"[\w.]+:[\w.]+", factory):
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
    normalize = raw.get("normalize")
    if normalize is not None and not isinstance(normalize, dict):
        raise SpecError(f"{where}.normalize: expected {{mean: [...], std: [...]}}, found {normalize!r}")
    normalization = build(Normalization, normalize, f"{where}.normalize") if normalize is not None else None
    state, training, checkpoint = _state(raw.get("state", "untrained"), f"{where}.state", base)
    params = {
        "source": source,
        "state": {"trained": as_plain(training)} if training is not None else raw.get("state", "untrained"),
        "normalize": normalize,
        "classes": classes,
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
    )


def _state(value: Any, where: str, base: Path) -> tuple[Any, TrainingConfig | None, Path | None]:
    if isinstance(value, dict):
        if set(value) != {"trained"} or not isinstance(value["trained"], dict):
            raise SpecError(f"{where}: expected {{trained: {{epochs: 5}}}}, found {value!r}")
        return "trained", build(TrainingConfig, value["trained"], f"{where}.trained"), None
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


def _recipe_entry(raw: Mapping[str, Any], where: str, _base: Path) -> RecipeEntry:
    recipe = build(Recipe, _rest(raw), where, _COMMON)
    name = raw.get("name", recipe.default_id)
    return RecipeEntry(**_common(raw, "recipe", where, name), name=name, params=as_plain(recipe), recipe=recipe)


def _threat_model_entry(raw: Mapping[str, Any], where: str, _base: Path) -> ThreatModelEntry:
    name = _name(raw, where)
    threat_model = _lookup(THREAT_MODELS, name, where)
    values = _rest(raw)
    for key in values:
        if key not in ("can", "knows", "withhold"):
            raise SpecError(
                f"{where}: unknown key '{key}': {suggestion(str(key), ('can', 'knows', 'withhold', *_COMMON))}"
            )
    can = _words(values.get("can", []), CAPABILITIES, f"{where}.can")
    if not can <= threat_model.capabilities:
        raise SpecError(f"{where}.can: {name} cannot change anything; use malicious_server")
    auxiliary: str | None = None
    knows: set[str] = set()
    listed = values.get("knows", [])
    for item in listed if isinstance(listed, list) else [listed]:
        if isinstance(item, dict) and set(item) == {"auxiliary"} and isinstance(item["auxiliary"], str):
            auxiliary = item["auxiliary"]
            knows.add("auxiliary")
        else:
            knows |= _words([item], KNOWLEDGE, f"{where}.knows")
    withhold = _words(values.get("withhold", []), ("recipe",), f"{where}.withhold")
    params = {
        "can": sorted(can),
        "knows": sorted(knows - ({"auxiliary"} if auxiliary else set()))
        + ([{"auxiliary": auxiliary}] if auxiliary else []),
        "withhold": sorted(withhold),
    }
    return ThreatModelEntry(
        **_common(raw, "threat_model", where, name),
        name=name,
        params=params,
        can=can,
        knows=frozenset(knows),
        withhold=withhold,
        auxiliary=auxiliary,
    )


def _words(values: Any, known: Any, where: str) -> frozenset[str]:
    if not isinstance(values, list):
        raise SpecError(f"{where}: expected a list, found {values!r}")
    for value in values:
        if value not in known:
            raise SpecError(f"{where}: unknown '{value}': {suggestion(str(value), known)}")
    return frozenset(values)


def _channel_entry(raw: Mapping[str, Any], where: str, _base: Path) -> ChannelEntry:
    name = _name(raw, where)
    channel = build(_lookup(CHANNELS, name, where), _rest(raw), where, _COMMON)
    return ChannelEntry(**_common(raw, "channel", where, name), name=name, params=as_plain(channel), channel=channel)


def _defense_entry(raw: Mapping[str, Any], where: str, _base: Path) -> DefenseEntry:
    name = _name(raw, where)
    defense = build(_lookup(DEFENSES, name, where), _rest(raw), where, _COMMON)
    return DefenseEntry(**_common(raw, "defense", where, name), name=name, params=as_plain(defense), defense=defense)


def _guard_entry(raw: Mapping[str, Any], where: str, _base: Path) -> GuardEntry:
    name = _name(raw, where)
    if name != "none" or _rest(raw):
        raise SpecError(f"{where}: this version has no guards yet; leave `guards: []`")
    return GuardEntry(**_common(raw, "guard", where, name), name=name, params={})


def _attack_entry(raw: Mapping[str, Any], where: str, _base: Path) -> AttackEntry:
    name = _name(raw, where)
    attack_class: type[Attack] = _lookup(ATTACKS, name, where)
    values = _rest(raw, "preset")
    preset = raw.get("preset")
    if preset is not None:
        if preset not in attack_class.presets:
            raise SpecError(
                f"{where}.preset: unknown preset '{preset}': {suggestion(str(preset), attack_class.presets)}"
            )
        values = {**attack_class.presets[preset], **values}
    attack = build(attack_class, values, where, (*_COMMON, "preset"))
    return AttackEntry(**_common(raw, "attack", where, name), name=name, params=as_plain(attack), attack=attack)


def _check_unique(entries: Sequence[Entry], key: str) -> None:
    seen: set[str] = set()
    for index, entry in enumerate(entries):
        if entry.id in seen:
            raise SpecError(f"{key}[{index}]: a second entry with the id '{entry.id}'; give one of them a label")
        seen.add(entry.id)


def _check_only(axes: Mapping[str, tuple[Entry, ...]]) -> None:
    for axis, entries in axes.items():
        for index, entry in enumerate(entries):
            for other, values in entry.only.items():
                known = {name for candidate in axes[other] for name in (candidate.id, candidate.name)}
                for value in values:
                    if value not in known:
                        raise SpecError(
                            f"{SPEC_KEYS[axis]}[{index}].only.{other}: '{value}' matches nothing: {suggestion(value, known)}"
                        )


def _check_auxiliary(axes: Mapping[str, tuple[Any, ...]]) -> None:
    data = {entry.id: entry for entry in axes["dataset"]}
    for index, entry in enumerate(axes["threat_model"]):
        if entry.auxiliary is None:
            continue
        if entry.auxiliary not in data:
            raise SpecError(
                f"threat_models[{index}].knows.auxiliary: no data entry '{entry.auxiliary}': {suggestion(entry.auxiliary, data)}"
            )
        if data[entry.auxiliary].settings.victims != 0:
            raise SpecError(
                f"threat_models[{index}].knows.auxiliary: data entry '{entry.auxiliary}' must have `victims: 0`"
            )

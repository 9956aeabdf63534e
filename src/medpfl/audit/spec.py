"""The audit spec: axes of entries, read from YAML or built from Python objects."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass as config_dataclass

from medpfl.audit.entries import (
    SPEC_KEYS,
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
from medpfl.audit.entry_parsing import PARSERS
from medpfl.audit.guarantee_settings import GuaranteeSettings
from medpfl.audit.limits import Limit, parse_limit
from medpfl.audit.utility_settings import Utility
from medpfl.audit.validation import as_plain, build
from medpfl.audit.yaml_text import read_yaml
from medpfl.core.config import STRICT
from medpfl.core.errors import SpecError, suggestion

_OTHER_KEYS = (
    "name",
    "seed",
    "seeds",
    "utility",
    "diagnose",
    "limit",
    "guarantee",
    "success_threshold",
    "device",
    "threads",
    "memory",
    "environment",
)


@config_dataclass(frozen=True, kw_only=True, config=STRICT)
class Diagnose:
    """How each cell is diagnosed: `diagnose: true`, or `diagnose: {victims: 4}`."""

    victims: Annotated[int, Field(ge=1, description="the sweep meets so many of a cell's first victims")] = 8


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
    diagnose: Diagnose | None
    utility: Utility | None
    device: str
    threads: int
    memory: int | None
    plain: Mapping[str, Any]
    base: Path
    axes: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)
    guarantee: GuaranteeSettings | None = None

    @property
    def factory_folders(self) -> tuple[Path, ...]:
        """Where packages of model factories are looked for before the installed ones.

        The spec's folder; those that the spec of a finished audit (`spec.yaml` in its folder) names; the current one.
        """
        environment = self.plain.get("environment")
        named = environment.get("factory_folders") if isinstance(environment, dict) else None
        texts = [text for text in named if isinstance(text, str)] if isinstance(named, list) else []
        return tuple(dict.fromkeys((self.base, *(self.base / text for text in texts), Path.cwd())))

    def entry(self, axis: str, identifier: str) -> Entry:
        """The entry of an axis with that id."""
        return next(entry for entry in self.axes[axis] if entry.id == identifier)

    def with_utility(self, how: Utility | None = None) -> Spec:
        """The same audit with utility measured; as it is where it is measured already."""
        if self.utility is not None:
            return self
        chosen = how or Utility()
        return replace(self, utility=chosen, plain={**self.plain, "utility": as_plain(chosen)})

    def limited(self, limit: Limit | None) -> Spec:
        """The same audit with another limit; as it is without one."""
        return self if limit is None else replace(self, limit=limit, plain={**self.plain, "limit": str(limit)})

    def diagnosed(self, how: Diagnose | None = None) -> Spec:
        """The same audit with a diagnosis of every cell; as it is where it has one already."""
        if self.diagnose is not None:
            return self
        chosen = how or Diagnose()
        return replace(self, diagnose=chosen, plain={**self.plain, "diagnose": as_plain(chosen)})


def load_spec(path: Path) -> Spec:
    """Reads a YAML spec; its paths are relative to its folder. Raises SpecError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file; `medpfl init` writes a spec") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise SpecError(f"{path}: is no text in UTF-8; give the path of a YAML file") from None
    plain = read_yaml(text, str(path))
    if not isinstance(plain, dict):
        found = {type(None): "nothing", list: "a list", str: "text"}.get(type(plain), repr(plain))
        raise SpecError(f"{path}: expected a mapping with `data`, `models`, `attacks`, ..., found {found}")
    return parse_spec(plain, base=path.parent)


def parse_spec(plain: Mapping[str, Any], base: Path) -> Spec:
    """Validates a spec given as plain values, as YAML gives them. Raises SpecError."""
    known = (*SPEC_KEYS.values(), *_OTHER_KEYS)
    for key in plain:
        if key not in known:
            raise SpecError(f"unknown key '{key}': {suggestion(str(key), known)}")
    axes: dict[str, tuple[Any, ...]] = {}
    for axis, key in SPEC_KEYS.items():
        raw_entries = _raw_entries(plain, key)
        entries = [PARSERS[axis](raw, f"{key}[{index}]", base) for index, raw in enumerate(raw_entries)]
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
        diagnose=_diagnose(plain.get("diagnose")),
        utility=_utility(plain.get("utility")),
        device=_typed(plain, "device", str, "auto"),
        threads=_threads(plain),
        memory=_memory(plain),
        plain=dict(plain),
        base=base,
        axes=axes,
        guarantee=_guarantee(plain.get("guarantee")),
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


def _diagnose(value: Any) -> Diagnose | None:
    if value is None or value is False:
        return None
    if value is True:
        return Diagnose()
    if not isinstance(value, dict):
        raise SpecError(f"diagnose: expected true, false or {{victims: 8}}, found {value!r}")
    return build(Diagnose, value, "diagnose")


def _guarantee(value: Any) -> GuaranteeSettings | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise SpecError(f"guarantee: expected a mapping such as {{delta: 1e-5, rounds: 20}}, found {value!r}")
    return build(GuaranteeSettings, value, "guarantee")


def _utility(value: Any) -> Utility | None:
    if value is None or value is False:
        return None
    if value is True:
        return Utility()
    if not isinstance(value, dict):
        raise SpecError(
            f"utility: expected true, false or settings such as {{rounds: 20, clients: 4}}, found {value!r}"
        )
    return build(Utility, value, "utility")


def _seeds(plain: Mapping[str, Any]) -> tuple[int, ...]:
    if "seed" in plain and "seeds" in plain:
        raise SpecError("seed and seeds: give one of them")
    seeds = plain.get("seeds", [plain.get("seed", 0)])
    whole = (
        isinstance(seeds, list)
        and seeds
        and all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 2**63 for s in seeds)
    )
    if not whole:
        raise SpecError(f"seeds: expected whole numbers from 0 to 2**63 - 1, found {seeds!r}")
    if len(set(seeds)) != len(seeds):
        raise SpecError(f"seeds: each seed once, found {seeds!r}")
    return tuple(seeds)


_UNITS = {"mb": 10**6, "mib": 2**20, "gb": 10**9, "gib": 2**30}


def _memory(plain: Mapping[str, Any]) -> int | None:
    """Bytes from a text such as `4 GB`."""
    text = plain.get("memory")
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|MiB|GB|GiB)", str(text), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise SpecError(f"memory: expected what one worker's search may take, such as 4 GB or 500 MB, found {text!r}")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def _threads(plain: Mapping[str, Any]) -> int:
    threads = _typed(plain, "threads", int, 1)
    if threads < 1:
        raise SpecError(f"threads: expected a whole number from 1 on, found {threads}")
    return int(threads)


def _typed(plain: Mapping[str, Any], key: str, kind: Any, default: Any) -> Any:
    value = plain.get(key, default)
    if value is not default and (not isinstance(value, kind) or isinstance(value, bool)):
        raise SpecError(f"{key}: expected {'text' if kind is str else 'a number'}, found {value!r}")
    return value


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

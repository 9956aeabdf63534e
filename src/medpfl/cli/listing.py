"""`medpfl list KIND` and `medpfl describe KIND NAME`: what there is, as the registries say it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medpfl.attacks import ATTACKS, Attack
from medpfl.audit.threat_models import THREAT_MODELS, ThreatModel
from medpfl.audit.validation import as_plain
from medpfl.core.domain import CAPABILITIES, KNOWLEDGE, ORACLES
from medpfl.core.errors import InputError, suggestion
from medpfl.core.registry import Entry, Registry
from medpfl.data import DATASETS, READERS
from medpfl.defenses import DEFENSES, Composition, Defense
from medpfl.federation.channels import CHANNELS
from medpfl.guards import GUARDS, Guard
from medpfl.metrics import METRICS
from medpfl.models import MODELS, SEGMENTATION

REGISTRIES: Mapping[str, Registry[Any]] = {
    "attacks": ATTACKS,
    "defenses": DEFENSES,
    "guards": GUARDS,
    "models": MODELS,
    "datasets": DATASETS,
    "metrics": METRICS,
    "readers": READERS,
    "channels": CHANNELS,
    "threat_models": THREAT_MODELS,
}

KINDS = (*REGISTRIES, "knowledge")

LOOKS = {"at the received model before training": "before", "at the update before it is sent": "after"}
"""When a guard looks -> the method that it has for that."""

KindArgument = Annotated[
    str,
    typer.Argument(
        metavar="KIND",
        help="attacks, defenses, guards, models, datasets, metrics, readers, channels, threat_models or knowledge",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="write JSON to standard output instead of text")]


COMPOSE: Entry[Any] = Entry(
    "compose",
    Composition,
    "several defenses in the order of a list, as {compose: [{name: clip, bound: 1}, {name: gaussian}], label: LABEL}",
    limits="orders that make no sense are refused with the reason: noise after sign, noise after error feedback, what reads "
    "images again after per-example noise, images mixed before per-example clipping, an order that is not that of the round",
)
"""What `list` and `describe` say beside the registered defenses."""


@dataclass(frozen=True)
class Parameter:
    """One setting of a configuration. `default` is None for a setting that must be given."""

    name: str
    type: str
    default: str | None
    description: str


def register(app: typer.Typer) -> None:
    """Adds `list` and `describe`."""
    app.command("list")(list_kind)
    app.command("describe")(describe)


def list_kind(kind: KindArgument, as_json: JsonOption = False) -> None:
    """List what there is of one kind, with one line each.

    \b
    Examples:
      medpfl list attacks
      medpfl list readers --json
    """
    found = entries(kind)
    if as_json:
        keys = ("name", "summary", "paper", "limits")
        typer.echo(json.dumps([{key: getattr(entry, key) for key in keys} for entry in found], indent=2))
        return
    console = Console(highlight=False)
    table = Table("name", "what it is", box=None, pad_edge=False)
    for entry in found:
        table.add_row(Text(entry.name, no_wrap=True), Text(entry.summary))
    console.print(table)
    console.print(f"\nMore about one of them: medpfl describe {kind} NAME", markup=False)


def describe(
    kind: KindArgument,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="a name that `medpfl list KIND` shows", show_default=False)
    ],
    as_json: JsonOption = False,
) -> None:
    """Say what something does, where it is published, what it needs, its settings and its limits.

    \b
    Examples:
      medpfl describe attacks gradinv
      medpfl describe readers dicom --json
    """
    facts = description(kind, name)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    console.print(Text(facts["name"], style="bold"))
    console.print(Text(facts["summary"]))
    for title in ("paper", "limits"):
        if facts[title]:
            console.print(Text(f"\n{title.capitalize()}: {facts[title]}"))
    for title, value in facts["facts"].items():
        console.print(Text(f"{title.replace('_', ' ').capitalize()}: {_shown(value)}"))
    if "knowledge" in facts:
        console.print(Text(f"\nRequired knowledge: {_shown(facts['knowledge']['requires'])}"))
        console.print(Text(f"Reads if granted: {_shown(facts['knowledge']['uses'])}"))
        console.print(Text(f"What the server must be able to change: {_shown(facts['capabilities'])}"))
    if facts["parameters"]:
        console.print()
        table = Table("parameter", "type", "default", "meaning", box=None, pad_edge=False)
        for row in facts["parameters"]:
            default = "(needed)" if row["default"] is None else row["default"]
            table.add_row(*(Text(text) for text in (row["name"], row["type"], default, row["description"])))
        console.print(table)
    for preset in facts["presets"]:
        console.print(Text(f"\nPreset {preset['name']}: {_shown(preset['settings'])}"))
        if preset["requires"]:
            console.print(Text(f"  required knowledge: {_shown(preset['requires'])}"))
    if facts["documentation"]:
        console.print(Text(f"\n{facts['documentation']}"))


def entries(kind: str) -> list[Entry[Any]]:
    """Everything of one kind, sorted by name. Raises InputError for an unknown kind."""
    if kind == "defenses":
        return sorted([*DEFENSES, COMPOSE], key=lambda entry: entry.name)
    if kind in REGISTRIES:
        return list(REGISTRIES[kind])
    if kind == "knowledge":
        return [Entry(name, None, meaning) for name, meaning in sorted(KNOWLEDGE.items())]
    raise InputError(f"unknown kind '{kind}': {suggestion(kind, KINDS)}")


def description(kind: str, name: str) -> dict[str, Any]:
    """All that `medpfl describe` says, as JSON-like values. Raises InputError for an unknown kind or name."""
    found = {entry.name: entry for entry in entries(kind)}
    if name not in found:
        raise InputError(f"unknown name '{name}' among {kind}: {suggestion(name, found)}")
    entry = found[name]
    facts: dict[str, Any] = {
        "kind": kind,
        "name": name,
        "summary": entry.summary,
        "paper": entry.paper,
        "limits": entry.limits,
        "facts": _facts(kind, entry),
        "parameters": [vars(parameter) for parameter in parameters(entry.item)],
        "presets": [],
        "documentation": _documentation(entry.item),
    }
    if isinstance(entry.item, type) and issubclass(entry.item, Attack):
        default = entry.item()
        facts["knowledge"] = {"requires": sorted(default.requires()), "uses": sorted(default.uses())}
        facts["capabilities"] = sorted(default.needs())
        facts["presets"] = [
            {"name": preset, "settings": settings, "requires": sorted(entry.item(**settings).requires())}
            for preset, settings in entry.item.presets.items()
        ]
    return facts


def parameters(item: Any) -> list[Parameter]:
    """The settings of a configuration class, in its order; none for anything else."""
    found: Mapping[str, Any] = getattr(item, "__pydantic_fields__", {}) if isinstance(item, type) else {}
    rows = []
    for name, info in found.items():
        default = None if info.default in (PydanticUndefined, MISSING) else _plain_text(info.default)
        bounds = [_bound(part) for part in info.metadata]
        kind = ", ".join([type_text(info.annotation), *[bound for bound in bounds if bound]])
        rows.append(Parameter(name, kind, default, info.description or ""))
    return rows


def type_text(annotation: Any) -> str:
    """A type in plain words.

    >>> type_text(int | None), type_text(Literal["all", "top10"]), type_text(tuple[float, float])
    ('int or null', 'all | top10', 'list of float, float')
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0])
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(type_text(part) for part in arguments)
    if origin in (tuple, list):
        return "list of " + ", ".join(type_text(part) for part in arguments if part is not Ellipsis)
    if annotation is NoneType:
        return "null"
    return {"str": "text", "Path": "path", "bool": "true | false"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation))
    )


def _bound(part: Any) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return ", ".join(f"{sign} {getattr(part, key):g}" for key, sign in signs.items() if hasattr(part, key))


def _facts(kind: str, entry: Entry[Any]) -> dict[str, Any]:
    """What an entry's own fields say: facts of data sets, metrics and threat models."""
    if kind == "knowledge":
        return {"oracle": entry.name in ORACLES}
    if isinstance(entry.item, ThreatModel):
        return {
            "sees_inside_channel": entry.item.sees_inside_channel,
            "can_be_granted": [f"{key} ({CAPABILITIES[key]})" for key in sorted(entry.item.capabilities)],
        }
    if kind in ("datasets", "metrics") and is_dataclass(entry.item) and not isinstance(entry.item, type):
        shown_above = {"name", "citation", "unsure"}
        return {key: value for key, value in as_plain(entry.item).items() if key not in shown_above and value != ""}
    if kind == "models":
        return {"trained_with": "masks" if entry.name in SEGMENTATION else "labels"}
    if isinstance(entry.item, type) and issubclass(entry.item, Guard):
        return {
            "looks": [
                when for when, method in LOOKS.items() if getattr(entry.item, method) is not getattr(Guard, method)
            ]
        }
    if isinstance(entry.item, type) and issubclass(entry.item, Defense):
        attack = dict(entry.item.adaptive_attack)
        return {"attack_that_knows_it": attack} if attack else {}
    if kind == "channels":
        return {"reveals_individual_updates": entry.item.reveals_individual_updates}
    return {}


def _documentation(item: Any) -> str:
    described: Callable[..., Any] | type | None = item if inspect.isclass(item) or inspect.isfunction(item) else None
    return inspect.cleandoc(described.__doc__ or "") if described is not None else ""


def _plain_text(value: Any) -> str:
    if is_dataclass(value) and not isinstance(value, type):
        return _shown({field.name: getattr(value, field.name) for field in fields(value)})
    return _shown(value) if not isinstance(value, str) else (value or '""')


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_shown(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(part) for part in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)

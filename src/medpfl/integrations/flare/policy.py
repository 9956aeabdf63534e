"""A site's privacy policy, `local/privacy.json`: filters that no job can leave out."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nvflare.apis.filter import Filter

from medpfl.core.errors import DataError, InputError
from medpfl.core.files import write_atomically
from medpfl.integrations.flare.answers import AnswerFilter
from medpfl.integrations.flare.vetting import ReceivedFilter

NAME = "privacy.json"
SCOPE = "guarded"


def write_policy(local: Path | str, filters: Sequence[Filter], *, scope: str = SCOPE) -> Path:
    """Writes `privacy.json` into a site's `local` folder: one scope with these filters, in this order, as the default.

    A ReceivedFilter or VettingFilter goes to what comes, the others to what leaves. There is one scope only, because a
    job may name any scope that a site defines. Raises InputError where a filter of what comes or of what leaves is
    missing, or a policy stands there already.
    """
    came = [one for one in filters if isinstance(one, ReceivedFilter)]
    leaves = [one for one in filters if isinstance(one, AnswerFilter)]
    if others := [one for one in filters if one not in came and one not in leaves]:
        raise InputError(f"{type(others[0]).__name__} is no filter of a site; name filters of what comes or leaves")
    if not came or not leaves:
        raise InputError(
            "a policy needs a filter of what comes (VettingFilter, ReceivedFilter) and one of what leaves "
            "(DefenseFilter, GateFilter)"
        )
    path = Path(local) / NAME
    if path.exists():
        raise InputError(f"{path}: a policy stands there; look at it and take it away first")
    policy = {
        "format_version": 2,
        "scopes": [
            {
                "name": scope,
                "properties": {},
                "task_data_filters": [_entry(one, "in") for one in came],
                "task_result_filters": [_entry(one, "out") for one in leaves],
            }
        ],
        "default_scope": scope,
    }
    write_atomically(path, (json.dumps(policy, indent=2) + "\n").encode())
    return path


def policy_problems(local: Path | str) -> list[str]:
    """Sentences on what a site's policy leaves open; empty where every job meets a filter of what leaves.

    Raises DataError where the file cannot be read.
    """
    path = Path(local) / NAME
    if not path.exists():
        return [f"{path}: there is none, so jobs meet no filter of the site"]
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    scopes = found.get("scopes") if isinstance(found, Mapping) else None
    if not isinstance(scopes, list) or not scopes:
        return [f"{path}: names no scope, so jobs meet no filter of the site"]
    names = [str(scope.get("name", "")) for scope in scopes]
    problems = [
        f"scope '{name}' has no filter of what leaves, and a job may name it"
        for name, scope in zip(names, scopes, strict=True)
        if not any(_leaves(entry) for entry in scope.get("task_result_filters") or [])
    ]
    if len(names) > 1:
        problems.append(f"a job may choose among the scopes {', '.join(names)}: define one only")
    if found.get("default_scope") not in names:
        problems.append("there is no default scope: jobs that name none are refused")
    return problems


def _leaves(entry: Mapping[str, Any]) -> bool:
    return str(entry.get("direction", "out")).lower() in ("out", "inout") and not entry.get("disabled")


def _entry(one: Filter, direction: str) -> dict[str, Any]:
    """The filter by its class and the parameters that are not the default, as FLARE builds it again."""
    known = inspect.signature(type(one)).parameters
    arguments = {
        name: getattr(one, name) for name, parameter in known.items() if getattr(one, name) != parameter.default
    }
    kind = type(one)
    return {"path": f"{kind.__module__}.{kind.__qualname__}", "direction": direction, "args": arguments}

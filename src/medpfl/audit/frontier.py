"""The price of protection: what the best attacker still gets under each defense, and what the defense costs.

Settings of one frontier differ in their defense only. Computed from rows of `cells.csv`, so that a finished audit can
be judged against another limit.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from medpfl.audit.advice import advice
from medpfl.audit.limits import Limit, parse_limit
from medpfl.audit.prices import MEASURE, Frontier, Priced, Span

Row = Mapping[str, Any]

LESS_IS_MORE = frozenset({"mse_mean", "mse_median", "mse_low", "mse_high"})
"""Columns in which a smaller number is more leakage."""

DEFAULT_COLUMN = "asr"

OUTDONE = -1.0
"""An attacker whose whole interval of `gain_psnr` (dB) lies below this is worse than one who ignores the update."""


def frontiers(rows: Iterable[Row], utility: Mapping[str, Any] | None, limit: Limit | None) -> tuple[Frontier, ...]:
    """A frontier for every data, model, recipe, channel and kind of adversary that has utility.

    rows: of `cells.csv`, typed or as text. utility: the entry of `summary.json`.
    """
    if utility is None:
        return ()
    entries = {cell: entry for entry in utility["settings"] for cell in entry["cells"]}
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["cell"] in entries and entries[row["cell"]]["refusal"] is None and _counts(row):
            key = tuple(str(row[axis]) for axis in ("dataset", "model", "recipe", "channel"))
            groups.setdefault((*key, _adversary(row)), []).append(row)
    return tuple(_frontier(key, same, entries, limit) for key, same in groups.items())


def as_plain(found: Frontier) -> dict[str, Any]:
    """For `summary.json`: an epsilon that is not bounded is the text `inf`."""
    plain = asdict(found)
    for setting in plain["settings"]:
        if setting["epsilon"] == math.inf:
            setting["epsilon"] = "inf"
    return plain


def _counts(row: Row) -> bool:
    """Whether a cell can say what leaks: finished, without oracle knowledge, guard or diagnosis."""
    return (
        row.get("status") == "done"
        and not row.get("oracle")
        and not row.get("diagnosis_of")
        and str(row.get("guard") or "none") == "none"
    )


def _frontier(
    key: tuple[str, ...], rows: Sequence[Row], entries: Mapping[str, Mapping[str, Any]], limit: Limit | None
) -> Frontier:
    column = limit.column if limit is not None else DEFAULT_COLUMN
    by_defense: dict[str, list[Row]] = {}
    for row in rows:
        by_defense.setdefault(str(row["defense"]), []).append(row)
    compared = limit or parse_limit(f"{DEFAULT_COLUMN} <= 1", "limit")
    found = [_priced(same, entries[same[0]["cell"]], compared, limit) for same in by_defense.values()]
    settings = _with_strengths([one for one in found if one is not None], by_defense)
    settings = [replace(one, dominated_by=_dominating(one, settings, column)) for one in settings]
    entry = entries[rows[0]["cell"]]
    undefended, guessing = _span(entry["undefended"][MEASURE]), entry["majority"][MEASURE]
    learnt = undefended.low is None or undefended.low > guessing
    recommended = _cheapest(settings) if limit is not None and learnt else None
    dataset, model, recipe, channel, adversary = key
    return Frontier(
        dataset=dataset,
        model=model,
        recipe=recipe,
        channel=channel,
        adversary=adversary,
        column=column,
        limit=None if limit is None else str(limit),
        settings=tuple(settings),
        recommended=None if recommended is None else recommended.defense,
        advice=advice(settings, recommended, limit, undefended if not learnt else None),
        alone=_span(entry["alone"][MEASURE]),
        guessing=guessing,
        notes=tuple(entry["notes"]),
    )


def _priced(rows: Sequence[Row], entry: Mapping[str, Any], compared: Limit, limit: Limit | None) -> Priced | None:
    """The setting with its most successful attacker; None where no attack has this number."""
    measured = [(row, span) for row in rows if (span := spread(row, compared)).value is not None]
    if not measured:
        return None
    sign = -1.0 if compared.column in LESS_IS_MORE else 1.0
    strongest, leakage = max(
        measured, key=lambda pair: (sign * (pair[1].value or 0.0), _number(pair[0].get("psnr_mean")) or 0.0)
    )
    params = _params(strongest, "defense")
    none = params.get("name", strongest["defense"]) == "none"
    own = entry["defended"]
    verdicts = [compared.surely(row) for row, _ in measured]
    highest = _number(strongest.get("gain_psnr_high"))
    outdone = not none and highest is not None and highest < OUTDONE
    acceptable = None if limit is None or outdone else _all(verdicts)
    return Priced(
        defense=str(strongest["defense"]),
        family="" if none else str(params.get("name", strongest["defense"])),
        strength=None,
        attack=str(strongest["attack"]),
        leakage=leakage,
        knows=_true(strongest.get("adaptive")),
        informed=none or any(_true(row.get("adaptive")) for row, _ in measured),
        balanced_accuracy=_span(own["balanced_accuracy"]),
        auc=_span(own["auc"]),
        lost=_span(entry["lost"][MEASURE]),
        victims=int(_number(strongest.get("victims")) or 0),
        failed=int(sum(_number(row.get("failed")) or 0 for row in rows)),
        epsilon=_number(strongest.get("epsilon"), infinite=True),
        bytes_sent=_number(strongest.get("bytes_sent")),
        acceptable=acceptable,
        outdone=outdone,
    )


def _all(verdicts: Sequence[bool | None]) -> bool | None:
    """False if any is, None if one cannot be said, else true."""
    if False in verdicts:
        return False
    return None if None in verdicts else True


def spread(row: Row, limit: Limit) -> Span:
    """A row's number in the column of a limit, with its interval."""
    low, high = limit.ends
    return Span(_number(row.get(limit.column)), _number(row.get(low)), _number(row.get(high)))


def _with_strengths(settings: Sequence[Priced], rows: Mapping[str, Sequence[Row]]) -> list[Priced]:
    """Each family in the order of its strength: the one number that differs in it, or else by what leaks."""
    families: dict[str, list[Priced]] = {}
    for setting in settings:
        families.setdefault(setting.family, []).append(setting)
    ordered: list[Priced] = []
    for family in sorted(families):
        members = families[family]
        flat = {member.defense: _flat(_params(rows[member.defense][0], "defense")) for member in members}
        seen = Counter(name for values in flat.values() for name in values)
        varying = [
            name
            for name, times in seen.items()
            if times == len(members) and len({values[name] for values in flat.values()}) > 1
        ]
        if len(varying) == 1:
            members = [replace(member, strength=flat[member.defense][varying[0]]) for member in members]
            members.sort(key=lambda member: member.strength or 0.0)
        else:
            members.sort(key=lambda member: member.leakage.value or 0.0)
        ordered += members
    return ordered


def _dominating(setting: Priced, settings: Sequence[Priced], column: str) -> str | None:
    """The best of those that leak no more and are worth no less, and differ in one of both."""
    leak, worth = _leak(setting, column), setting.utility
    if worth is None:
        return None
    better = [
        other
        for other in settings
        if other.utility is not None
        and not other.outdone
        and (other.informed or not setting.informed)
        and _leak(other, column) <= leak
        and other.utility >= worth
        and (_leak(other, column), other.utility) != (leak, worth)
    ]
    return max(better, key=lambda other: other.utility or 0.0).defense if better else None


def _leak(setting: Priced, column: str) -> float:
    value = setting.leakage.value or 0.0
    return -value if column in LESS_IS_MORE else value


def _cheapest(settings: Sequence[Priced]) -> Priced | None:
    """The most useful setting that surely holds the limit; attacked by somebody who knows it, where there is such a one."""
    fits = [one for one in settings if one.acceptable is True and one.utility is not None]
    informed = [one for one in fits if one.informed]
    return max(informed or fits, key=lambda one: (one.utility or 0.0, -(one.bytes_sent or 0.0)), default=None)


def _span(numbers: Mapping[str, float | None]) -> Span:
    return Span(numbers["mean"], numbers["low"], numbers["high"])


def _adversary(row: Row) -> str:
    """The kind of adversary, whatever it was granted."""
    return str(_params(row, "threat_model").get("name", row.get("threat_model", "")))


def _params(row: Row, axis: str) -> Mapping[str, Any]:
    value = row.get(f"{axis}_params")
    if isinstance(value, str):
        value = json.loads(value) if value else {}
    return value if isinstance(value, Mapping) else {}


def _flat(values: Any, prefix: str = "") -> dict[str, float]:
    """The numbers in nested settings, by their path."""
    if isinstance(values, Mapping):
        values = list(values.items())
    elif isinstance(values, list):
        values = list(enumerate(values))
    else:
        number = isinstance(values, int | float) and not isinstance(values, bool)
        return {prefix: float(values)} if number else {}
    return {path: number for name, value in values for path, number in _flat(value, f"{prefix}.{name}").items()}


def _true(value: Any) -> bool:
    return value is True or str(value).lower() == "true"


def _number(value: Any, infinite: bool = False) -> float | None:
    if value is None or value == "" or isinstance(value, bool):
        return None
    found = float(value)
    return None if math.isnan(found) or (math.isinf(found) and not infinite) else found

"""Writes `report.html`: one file that needs nothing but a browser."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from medpfl.audit.limits import Limit
from medpfl.core.files import write_atomically
from medpfl.report import answer, diagnosis_wording, formatting, frontier, guarantees, guards, settings, wording
from medpfl.report.charts import chart_groups, round_charts
from medpfl.report.comparison import outcomes
from medpfl.report.curves import DECIBELS, columns
from medpfl.report.diagnosis import Diagnosis, diagnoses, pictured, scale
from medpfl.report.figures import NULL_STYLES, Style, line_style
from medpfl.report.gallery import Picture, gallery, picture
from medpfl.report.glossary import LIMITS, glossary
from medpfl.report.loading import load_audit
from medpfl.report.problems import SHOWN_CASES, defense_warnings, failure_groups, refusal_groups, silent_groups
from medpfl.report.redaction import without_items
from medpfl.report.table import cell_table, namer
from medpfl.report.updates import groups, owned, recorded_updates
from medpfl.report.views import Audit, Measured

FILE_NAME = "report.html"

COMPARED_BYTES = 2**18
"""Bytes of one picture in the diagnosis at most."""

DATA_COLUMNS = {
    "dataset": "Data",
    "seed": "Seed",
    "images": "Images",
    "victims": "Victims",
    "bystanders": "Bystanders",
    "training": "Pool: training",
    "auxiliary": "Pool: auxiliary",
    "null": "Pool: null baselines",
    "near_duplicates": "Near duplicates left out",
    "dropped_by_patient": "Left out by patient",
    "notes": "Notes",
}
"""Keys of an entry of `data` in `summary.json`, as headings."""


def write_report(folder: Path, *, images: bool = True, limit: Limit | None = None) -> Path:
    """Writes `report.html` into the output folder of an audit, finished or not, and returns its path.

    Reads `results.csv`, `cells.csv`, `summary.json`, `spec.yaml` and the PNGs below `images/`, and nothing else. The
    file appears at once and complete, readable by its owner only. Without `images` it holds no image and no item name.
    limit: what settings are judged by in place of the audit's own.
    Raises StoreError where the folder holds no results or cannot be read or written.
    """
    audit = load_audit(folder, limit)
    path = folder / FILE_NAME
    write_atomically(path, render(audit if images else without_items(audit), folder, images=images).encode("utf-8"))
    return path


def render(audit: Audit, folder: Path, *, images: bool) -> str:
    """The report as HTML. `folder` is where the paths of images start."""
    found = outcomes(audit)
    diagnosed = diagnoses(audit)
    told = recorded_updates(audit.updates)
    script = _source("report.js")
    warnings = tuple(dict.fromkeys([*audit.warnings, *(text for cell in audit.cells for text in cell.warnings)]))
    return (
        _environment()
        .get_template("report.html")
        .render(
            audit=audit,
            images=images,
            outcomes=found,
            overall=answer.overall(found, "recording" if audit.replay else "data set"),
            cell_name=namer(audit.cells),
            table=cell_table(audit.cells, audit.threshold),
            chart_groups=chart_groups(audit),
            round_charts=round_charts(audit),
            curve_columns=columns(audit.threshold),
            curve_decibels=DECIBELS,
            diagnoses=[(one, _compared(one, folder) if images else ()) for one in diagnosed],
            decibels=scale(diagnosed),
            recorded_updates=told,
            update_groups=groups(told),
            updates_owned=owned(told),
            gallery=gallery(audit.cells, folder) if images else None,
            opened={outcome.strongest.id for outcome in found if outcome.strongest is not None},
            guard_outcomes=guards.guard_outcomes(audit.cells),
            prices=frontier.sections(audit),
            trained_how=frontier.how_trained(audit.utility),
            price_problems=frontier.problems(audit.utility),
            promises=guarantees.promises(audit.cells),
            beside_pictures=guards.beside_pictures(audit.cells),
            failures=failure_groups(audit.cells),
            silent=silent_groups(audit.cells),
            shown_cases=SHOWN_CASES,
            refusals=refusal_groups(audit.cells),
            warnings=warnings,
            defense_warnings=defense_warnings(warnings, audit.cells),
            terms=glossary(audit.threshold),
            limits=LIMITS,
            data=_data_table(audit),
            machine=[
                ("Versions", _flat(audit.versions)),
                ("Hardware", _flat(audit.hardware)),
                ("Plan", _flat(audit.plan)),
            ],
            style=Markup(_source("report.css")),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("medpfl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        decimals=formatting.decimals,
        percent=formatting.percent,
        percent_interval=formatting.percent_interval,
        duration=formatting.duration,
        date=formatting.date,
        counted=formatting.count,
        swatch=_swatch,
        bar=_bar,
        signed=formatting.signed,
        interval=formatting.interval,
        effect_bar=_effect_bar,
    )
    environment.globals.update(
        answer=answer,
        wording=wording,
        diagnosis=diagnosis_wording,
        settings=settings,
        guarantees=guarantees,
        guards=guards,
        line_style=line_style,
        null_styles=NULL_STYLES,
        dash=formatting.DASH,
    )
    return environment


def _source(name: str) -> str:
    """A file of the template folder as it is."""
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _swatch(style: Style, null: bool = False) -> Markup:
    """A piece of line as it is drawn in the figure, for its legend."""
    dashes = " ".join(f"{part * 1.6:g}" for part in style.dashes)
    marker = "" if null or not style.marker else _MARKERS[style.marker]
    return Markup(
        '<svg class="swatch" viewBox="0 0 36 12" aria-hidden="true"><path d="M1 6H35" fill="none" stroke="{0}" '
        'stroke-width="2.4" stroke-dasharray="{1}"/><g fill="{0}">{2}</g></svg>'
    ).format(style.color, dashes, Markup(marker))


_MARKERS = {
    "o": '<circle cx="18" cy="6" r="4"/>',
    "s": '<path d="M14 2h8v8h-8z"/>',
    "^": '<path d="M18 1l5 9h-10z"/>',
    "D": '<path d="M18 1l5 5-5 5-5-5z"/>',
    "v": '<path d="M18 11l5-9h-10z"/>',
}


def _bar(measured: Measured, null: float | None) -> Markup:
    """A rate with its interval on a line from 0 to 1; the upright mark is the best null baseline."""
    if measured.value is None:
        return Markup("")
    low = measured.value if measured.low is None else measured.low
    high = measured.value if measured.high is None else measured.high
    x = [4 + 92 * part for part in (low, high, measured.value, null or 0.0)]
    tick = Markup('<path class="null" d="M{0:.1f} 1V15"/>').format(x[3]) if null is not None else Markup("")
    return Markup(
        '<svg class="bar" viewBox="0 0 100 16" aria-hidden="true"><path class="track" d="M4 8H96"/>{0}'
        '<path class="interval" d="M{1:.1f} 8H{2:.1f}"/><circle cx="{3:.1f}" cy="8" r="4"/></svg>'
    ).format(tick, *x[:3])


def _effect_bar(measured: Measured, reach: float) -> Markup:
    """A difference with its interval on a line from -reach to reach; the upright mark is zero."""
    if measured.value is None:
        return Markup("")
    low = measured.value if measured.low is None else measured.low
    high = measured.value if measured.high is None else measured.high
    x = [50 + 46 * part / reach for part in (low, high, measured.value)]
    return Markup(
        '<svg class="bar" viewBox="0 0 100 16" aria-hidden="true"><path class="track" d="M4 8H96"/>'
        '<path class="null" d="M50 1V15"/><path class="interval" d="M{0:.1f} 8H{1:.1f}"/>'
        '<circle cx="{2:.1f}" cy="8" r="4"/></svg>'
    ).format(*x)


def _compared(found: Diagnosis, folder: Path) -> tuple[tuple[str, tuple[tuple[str, Picture], ...]], ...]:
    """Per victim: its truth first, then what came back as it is and without what protects it, with captions."""
    rows = []
    for before, after in pictured(found):
        paths = (before.truth_image, before.reconstruction_image, after.reconstruction_image)
        shown = [picture(folder, path, COMPARED_BYTES)[0] for path in paths]
        titles = (
            "truth",
            f"as it is, SSIM {formatting.decimals(before.ssim)}",
            f"without, SSIM {formatting.decimals(after.ssim)}",
        )
        rows.append((before.victim, tuple(zip(titles, shown, strict=True))))
    return tuple(rows)


def _data_table(audit: Audit) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the data section: the known keys that occur, then any others."""
    present = dict.fromkeys(key for entry in audit.data for key in entry)
    keys = [key for key in DATA_COLUMNS if key in present] + [key for key in present if key not in DATA_COLUMNS]
    headings = [DATA_COLUMNS.get(key, key.replace("_", " ").capitalize()) for key in keys]
    return headings, [[_plain(entry.get(key)) for key in keys] for entry in audit.data]


def _flat(entry: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as pairs of dotted name and text."""
    pairs: list[tuple[str, str]] = []
    for key, value in entry.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            pairs.extend(_flat(value, f"{name}."))
        else:
            pairs.append((name, _plain(value)))
    return pairs


def _plain(value: Any) -> str:
    """Any value of a JSON file as text."""
    if value is None or value == "" or value == [] or value == {} or value != value:
        return formatting.DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_plain(part) for part in value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else str(value)

"""The price of protection as the report shows it: a figure of leakage against utility, a table, and the recommendation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from medpfl.audit.prices import Frontier, Priced, Span
from medpfl.report.figures import Style, line_style
from medpfl.report.formatting import DASH, count, decimals, interval, signed
from medpfl.report.frontier_figure import frontier_svg
from medpfl.report.views import Audit, Measured

LEAKAGE = {
    "asr": ("success rate of the attack (ASR)", 2, ""),
    "recovered": ("share of images above 30 dB", 2, ""),
    "psnr_mean": ("mean PSNR, dB", 1, " dB"),
    "ssim_mean": ("mean SSIM", 2, ""),
    "mse_mean": ("mean squared error", 4, ""),
    "gain_psnr": ("gain in PSNR over the best null baseline, dB", 1, " dB"),
    "gain_ssim": ("gain in SSIM over the best null baseline", 2, ""),
}
"""Column -> what it is called, its decimals and unit; other columns bear their own name."""


@dataclass(frozen=True)
class Line:
    """One row of the table and one point of the figure. `number` tells which."""

    number: int
    defense: str
    style: Style | None
    leakage: str
    leakage_interval: str
    attacker: str
    auc: str
    auc_interval: str
    balanced_accuracy: str
    balanced_accuracy_interval: str
    lost: str
    lost_interval: str
    epsilon: str
    bytes_sent: str
    verdict: str
    recommended: bool
    dominated: bool


@dataclass(frozen=True)
class Section:
    """One frontier, ready to be written out. `settings` name what its points share."""

    title: str
    leakage: str
    advice: str
    found: bool
    svg: Markup
    lines: tuple[Line, ...]
    alone: str
    guessing: str
    notes: tuple[str, ...]
    has_epsilon: bool
    has_bytes: bool


def sections(audit: Audit) -> tuple[Section, ...]:
    """A section for every frontier of the audit."""
    varying = [
        axis
        for axis in ("dataset", "model", "recipe", "channel", "adversary")
        if len({getattr(one, axis) for one in audit.frontiers}) > 1
    ]
    return tuple(_section(one, varying, number) for number, one in enumerate(audit.frontiers, 1))


def how_trained(utility: Mapping[str, Any] | None) -> str:
    """How the federation was trained, in sentences."""
    if not utility or not utility.get("settings"):
        return ""
    how, entry = utility["how"], utility["settings"][0]
    recipe = entry["recipe_as_trained"]
    clients = entry["clients"]
    partition = {
        "iid": "alike",
        "site": "one per hospital",
        "dirichlet": f"with unlike classes (Dirichlet, concentration {how['concentration']:g})",
    }[how["partition"]]
    sends = (
        "send the gradient of every batch, and the server takes a step on their mean"
        if recipe["update"] == "gradient"
        else f"send {'the change of their weights' if recipe['update'] == 'delta' else 'their new weights'} once a round"
    )
    sizes = (
        f"{min(clients)} to {max(clients)}" if clients and min(clients) < max(clients) else f"{max(clients, default=0)}"
    )
    return (
        f"{count(how['seeds'], 'federation')} per setting, {count(how['rounds'], 'round')} with "
        f"{count(len(clients), 'client')}, {partition}, {sizes} training images each. Clients take "
        f"{count(recipe['epochs'], 'pass', 'passes')} over their images per round in batches of {recipe['batch_size']} and {sends} "
        f"({recipe['optimizer']}, learning rate {recipe['learning_rate']:g}). {entry['held_out']} held-out images, of "
        "patients who are neither victims nor known to the adversary. The defense is the one that was attacked, in the same "
        "place and strength, and what clients keep goes on from round to round; the attacked clients may hold other "
        "numbers of images (see the recipe)."
    )


def problems(utility: Mapping[str, Any] | None) -> tuple[str, ...]:
    """What keeps utility from being read as it stands."""
    if not utility:
        return ()
    found = []
    if utility["done"] + utility["failed"] < utility["runs"]:
        found.append(f"{utility['done']} of {utility['runs']} federations are trained so far.")
    if utility["failed"]:
        reasons = "; ".join(utility["reasons"])
        found.append(f"{count(utility['failed'], 'federation')} failed ({reasons}), so their settings have no utility.")
    for entry in utility["settings"]:
        name = f"{entry['model']} on {entry['dataset']}, defense {entry['defense']}"
        if entry["refusal"] is not None:
            found.append(f"{name}: not measured, because {entry['refusal']}.")
        elif entry["broken_down"]:
            found.append(
                f"{name}: {count(entry['broken_down'], 'federation')} broke down (no finite output), counted as guessing."
            )
    for entry in utility["settings"]:
        low = entry["undefended"]["auc"]["low"]
        if low is not None and low <= 0.5:
            found.append(
                f"{entry['model']} on {entry['dataset']} learnt nothing for sure even without a defense (AUC interval reaches "
                "0.5): more rounds, another learning rate or more images are needed before defenses can be compared."
            )
    return tuple(dict.fromkeys(found))


def _section(found: Frontier, varying: list[str], number: int) -> Section:
    name, places, unit = LEAKAGE.get(found.column, (found.column, 3, ""))
    styles = styles_of(found)
    title = ", ".join(getattr(found, axis).replace("_", " ") for axis in varying) or found.dataset
    lines = tuple(
        _line(place, setting, styles.get(setting.family), found, places, unit)
        for place, setting in enumerate(found.settings, 1)
    )
    description = f"{title}: {name} against AUC for {count(len(lines), 'defense setting')}. The table has the values."
    svg = Markup(frontier_svg(found, styles, name, f"price{number}", description))
    return Section(
        title=title,
        leakage=name,
        advice=found.advice,
        found=found.recommended is not None,
        svg=svg,
        lines=lines,
        alone=_spread(found.alone, 3),
        guessing=decimals(found.guessing, 2),
        notes=found.notes,
        has_epsilon=any(setting.epsilon is not None for setting in found.settings),
        has_bytes=any(setting.bytes_sent is not None for setting in found.settings),
    )


def styles_of(found: Frontier) -> dict[str, Style]:
    """How the points of each family look."""
    families = dict.fromkeys(setting.family for setting in found.settings if setting.family)
    return {family: line_style(number) for number, family in enumerate(families)}


def _line(number: int, setting: Priced, style: Style | None, found: Frontier, places: int, unit: str) -> Line:
    verdicts = []
    if setting.defense == found.recommended:
        verdicts.append("recommended")
    elif found.limit is not None:
        told = {True: f"below {found.limit}", False: f"not surely below {found.limit}", None: "cannot be said"}
        verdicts.append("the attacks failed: nothing is known" if setting.outdone else told[setting.acceptable])
    if setting.dominated_by is not None:
        verdicts.append(f"dominated by {setting.dominated_by}")
    if setting.failed:
        verdicts.append(f"{count(setting.failed, 'image')} of failed cases count as not reconstructed")
    return Line(
        number=number,
        defense=setting.defense if setting.family else "no defense",
        style=style,
        leakage=f"{decimals(setting.leakage.value, places)}{unit}",
        leakage_interval=interval(_measured(setting.leakage), places),
        attacker=f"{setting.attack}, {_knowledge(setting)}" if setting.family else setting.attack,
        auc=decimals(setting.auc.value, 3),
        auc_interval=interval(_measured(setting.auc), 3),
        balanced_accuracy=decimals(setting.balanced_accuracy.value, 3),
        balanced_accuracy_interval=interval(_measured(setting.balanced_accuracy), 3),
        lost=signed(None if setting.lost.value is None else -setting.lost.value, 3) if setting.family else DASH,
        lost_interval=_negated(setting.lost) if setting.family else "",
        epsilon=_epsilon(setting.epsilon),
        bytes_sent=DASH if setting.bytes_sent is None else f"{setting.bytes_sent:,.0f}",
        verdict=", ".join(verdicts),
        recommended=setting.defense == found.recommended,
        dominated=setting.dominated_by is not None,
    )


def _knowledge(setting: Priced) -> str:
    if setting.knows:
        return "knows the defense"
    return "stronger than those who know it" if setting.informed else "does not know the defense: none who does was run"


def _epsilon(value: float | None) -> str:
    if value is None:
        return DASH
    return "\N{INFINITY}" if math.isinf(value) else f"{value:.3g}"


def _negated(span: Span) -> str:
    if span.low is None or span.high is None:
        return ""
    return f"{signed(-span.high, 3)} to {signed(-span.low, 3)}"


def _measured(span: Span) -> Measured:
    return Measured(span.value, span.low, span.high)


def _spread(span: Span, places: int) -> str:
    ends = interval(_measured(span), places)
    return decimals(span.value, places) + (f" ({ends})" if ends else "")

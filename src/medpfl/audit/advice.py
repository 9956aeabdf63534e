"""Which setting is recommended below a limit, or why none is, in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from medpfl.audit.limits import Limit
from medpfl.audit.prices import Priced, Span


def advice(
    settings: Sequence[Priced], recommended: Priced | None, limit: Limit | None, unlearnt: Span | None = None
) -> str:
    """The recommendation, or why there is none, in plain sentences.

    unlearnt: what the federation without defense reached, where that is not surely more than guessing.
    """
    if limit is None:
        return (
            "No limit was given, so nothing is recommended: say what is acceptable, for instance --limit 'asr<=0.05'."
        )
    if all(one.utility is None for one in settings):
        return f"Nothing is recommended below {limit}: the utility of these settings is not measured yet."
    if unlearnt is not None:
        return (
            f"Nothing is recommended: even without a defense the federation is not surely better than guessing (AUC "
            f"{_text(unlearnt)}), so what a defense costs cannot be said. Give it more rounds, images or another learning rate."
        )
    if recommended is None:
        return (
            f"No setting of this audit was found below {limit} at the upper end of its interval."
            f"{_why_none(settings, limit)}{_outdone(settings)}"
        )
    name = recommended.defense if recommended.family else "no defense"
    lost = recommended.lost
    price = (
        ""
        if lost.value is None or not recommended.family
        else f", {abs(lost.value):.3f} {'below' if lost.value >= 0 else 'above'} no defense"
    )
    if price and lost.low is not None and lost.high is not None:
        price += f" (difference {-lost.high:+.3f} to {-lost.low:+.3f})"
    knows = "" if not recommended.family else _known(recommended)
    cheaper = [
        one.defense
        for one in settings
        if one.acceptable is True and not one.informed and (one.utility or 0.0) > (recommended.utility or 0.0)
    ]
    more = (
        f" {', '.join(cheaper)} would cost less, but no attacker who knows it was run against it."
        if cheaper and recommended.informed
        else ""
    )
    return (
        f"The cheapest setting found below {limit}, at the upper end of its interval, is {name}: "
        f"{limit.column} {_text(recommended.leakage)} against {recommended.attack}{knows}; AUC {_text(recommended.auc)}"
        f"{price}. It holds for the attacks of this audit.{more}{_outdone(settings)}"
    )


def _outdone(settings: Sequence[Priced]) -> str:
    """Settings about which nothing is known because every attack on them failed; empty if there are none."""
    names = [one.defense for one in settings if one.outdone]
    if not names:
        return ""
    return (
        f" Nothing is known about {', '.join(names)}: the best attack there is further from the truth than pictures that "
        "owe nothing to the update, so the attacks failed, which is not the defense's merit."
    )


def _known(setting: Priced) -> str:
    if setting.knows:
        return ", who knows the defense"
    return ", the strongest although others know the defense" if setting.informed else ", who does not know the defense"


def _why_none(settings: Sequence[Priced], limit: Limit) -> str:
    """What comes nearest, and whether more victims alone could show more."""
    bounded = [
        one for one in settings if not one.outdone and one.leakage.high is not None and limit.comparison.startswith("<")
    ]
    if not bounded:
        return " With one victim there is no interval: attack more." if settings else ""
    nearest = min(bounded, key=lambda one: one.leakage.high or 0.0)
    text = f" The nearest is {nearest.defense} with an upper end of {nearest.leakage.high:.3g}."
    if limit.column == "asr" and nearest.leakage.value == 0 and 0 < limit.value < 1:
        needed = math.ceil(math.log(0.025) / math.log1p(-limit.value))
        text += f" Not one of its {nearest.victims} victims was reconstructed; to show {limit} takes {needed} such victims or more."
    return text


def _text(span: Span) -> str:
    if span.value is None:
        return "unknown"
    ends = "" if span.low is None or span.high is None else f" ({span.low:.3g} to {span.high:.3g})"
    return f"{span.value:.3g}{ends}"

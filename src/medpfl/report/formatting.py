"""Numbers as short texts. What is missing is a dash."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime

from medpfl.report.views import Measured

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def decimals(value: float | None, places: int = 2, unit: str = "") -> str:
    """A number with fixed places and a true minus sign.

    >>> decimals(18.46, 1, "dB"), decimals(-0.001), decimals(None)
    ('18.5 dB', '0.00', '–')
    """
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{value:.{places}f}"
    if float(text) == 0.0:
        text = text.removeprefix("-")
    return f"{text.replace('-', MINUS)}{f' {unit}' if unit else ''}"


def signed(value: float | None, places: int = 1, unit: str = "") -> str:
    """A difference, with its sign.

    >>> signed(2.25), signed(-2.25, 1, "dB"), signed(0.01)
    ('+2.2', '−2.2 dB', '0.0')
    """
    text = decimals(value, places, unit)
    return f"+{text}" if value is not None and value > 0 and float(f"{value:.{places}f}") > 0 else text


def percent(value: float | None) -> str:
    """A share in whole percent; what is not quite nothing or not quite all does not round to it.

    >>> percent(0.4375), percent(0.001), percent(0.999), percent(0), percent(None)
    ('44%', 'under 1%', 'over 99%', '0%', '–')
    """
    if value is None or not math.isfinite(value):
        return DASH
    if 0 < value < 0.005:
        return "under 1%"
    if 0.995 < value < 1:
        return "over 99%"
    return f"{value:.0%}"


def count(value: int, singular: str, plural: str = "") -> str:
    """A number of things.

    >>> count(1, "image"), count(1200, "image"), count(2, "study", "studies")
    ('1 image', '1,200 images', '2 studies')
    """
    return f"{value:,} {singular if value == 1 else plural or singular + 's'}"


def percent_interval(measured: Measured) -> str:
    """The interval of a share, empty where there is none.

    >>> percent_interval(Measured(0.5, 0.25, 0.75))
    '25% to 75%'
    """
    if measured.low is None or measured.high is None:
        return ""
    return f"{percent(measured.low)} to {percent(measured.high)}"


def interval(measured: Measured, places: int = 1) -> str:
    """The interval of a mean, empty where there is none.

    >>> interval(Measured(20.0, 18.04, 21.96))
    '18.0 to 22.0'
    """
    if measured.low is None or measured.high is None:
        return ""
    return f"{decimals(measured.low, places)} to {decimals(measured.high, places)}"


def duration(seconds: float | None) -> str:
    """A time span in the unit that a person would use.

    >>> duration(0.25), duration(75), duration(7260), duration(None)
    ('0.2 s', '1 min 15 s', '2 h 1 min', '–')
    """
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60:,} h"


def date(text: str) -> str:
    """An ISO time stamp as a date and time in UTC; anything else as it is.

    >>> date("2026-03-04T12:30:59+01:00"), date("yesterday")
    ('4 March 2026, 11:30 UTC', 'yesterday')
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC)
    zone = " UTC" if moment.tzinfo is not None else ""
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"


def listed(words: Sequence[str], last: str = "and") -> str:
    """Words as a list in a sentence.

    >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])
    ('a', 'a and b', 'a, b and c')
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}" if words else ""

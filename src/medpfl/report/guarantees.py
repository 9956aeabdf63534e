"""Guarantees beside attacks: what a defense promises by its construction, and what the audited attacks reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from medpfl.report.formatting import DASH, count, percent
from medpfl.report.guaranteed import Guaranteed
from medpfl.report.views import Cell, Measured

ALWAYS_EPSILON = 20.0
"""From here on an epsilon says next to nothing by itself."""


@dataclass(frozen=True)
class Promise:
    """One defense on one data set and recipe: what it guarantees, and the strongest attack that was run against it."""

    cells: tuple[Cell, ...]
    guaranteed: Guaranteed

    @property
    def strongest(self) -> Cell | None:
        """The attacked cell with the highest success rate; None if none has finished."""
        finished = [cell for cell in self.cells if cell.asr.value is not None]
        return max(finished, key=lambda cell: cell.asr.value or 0.0, default=None)

    @property
    def measured(self) -> Measured:
        """Its success rate."""
        return Measured() if self.strongest is None else self.strongest.asr

    @property
    def broken(self) -> bool:
        """Whether an attack succeeded more often than the bound allows, beyond chance."""
        low, limit = self.measured.low, self.guaranteed.observed_bound
        return low is not None and limit is not None and low > limit


def promises(cells: Sequence[Cell]) -> tuple[Promise, ...]:
    """One per defense, data set, model and recipe, defended ones only, in the order of the cells."""
    grouped: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        if cell.guaranteed is not None and cell.params.get("defense", {}).get("name", cell.defense) != "none":
            key = tuple(cell.axes.get(axis, "") for axis in ("dataset", "model", "recipe", "channel", "defense"))
            grouped.setdefault(key, []).append(cell)
    return tuple(Promise(tuple(group), group[0].guaranteed) for group in grouped.values() if group[0].guaranteed)


def statement(found: Guaranteed) -> str:
    """Epsilon and delta, or that there are none.

    >>> statement(Guaranteed("no formal guarantee"))
    'no formal guarantee'
    >>> statement(Guaranteed("gaussian, per image", epsilon=3.3414, delta=1e-5, unit="image", rounds=10))
    'ε = 3.34 at δ = 1e-05 over 10 rounds'
    """
    if not found.formal:
        return found.told
    if found.epsilon is None:
        return f"{found.told}; epsilon was not computed: {found.accountant}"
    size = "infinite" if math.isinf(found.epsilon) else f"{found.epsilon:.3g}"
    return f"ε = {size} at δ = {found.delta:g} over {count(found.rounds, 'round')}"


def unit(found: Guaranteed) -> str:
    """What is protected against whom, in words."""
    if not found.formal:
        return DASH
    holder = (
        "its own client before anything is sent"
        if found.added_by == "client"
        else "the server, which sees updates without noise"
    )
    differ = f"; two data sets that differ in {found.neighbors} look alike" if found.neighbors else ""
    return f"per {found.unit}{differ}. The noise is added by {holder}."


def limit(success: float | None) -> str:
    """A bound on a success rate, rounded up.

    >>> limit(0.0924), limit(0.99996), limit(None)
    ('at most 9.3%', 'at most 100%', '–')
    """
    return DASH if success is None else f"at most {math.ceil(1000 * success) / 10:g}%"


def share(value: float) -> str:
    """A prior in percent.

    >>> share(0.001), share(0.5)
    ('0.1%', '50%')
    """
    return f"{100 * value:g}%"


def priors(found: Sequence[Promise]) -> tuple[float, ...]:
    """The priors that any promise has a bound for."""
    return tuple(sorted({value for promise in found for value, _ in promise.guaranteed.curve}))


def curves(found: Sequence[Promise]) -> tuple[tuple[str, tuple[float | None, ...]], ...]:
    """Defense, data set and recipe, and the bounds at all `priors`."""
    rows = []
    for promise in found:
        known = dict(promise.guaranteed.curve)
        if known:
            cell = promise.cells[0]
            name = f"{cell.defense}, {cell.dataset}, {cell.axes.get('recipe', '')}"
            rows.append((name, tuple(known.get(value) for value in priors(found))))
    return tuple(rows)


def prior(found: Guaranteed) -> str:
    """How often a blind guess succeeds, and from what that is known."""
    if found.prior is None:
        return DASH
    floor = ", the least that so many images can show" if found.prior * found.prior_images < 1.5 else ""
    return f"{percent(found.prior)} (one guess on {count(found.prior_images, 'image')}{floor})"


def reading(found: Sequence[Promise]) -> tuple[str, ...]:
    """What must be said beside the table."""
    formal = [promise.guaranteed for promise in found if promise.guaranteed.formal]
    texts = []
    if any(one.bound is not None for one in formal):
        texts.append(
            "A bound holds against every attack, also those that nobody has found yet: by an attacker who knows "
            "everything except the one unit, whose blind guess succeeds no more often than stated. Who has a better "
            "prior than that, for instance earlier images of the same patient, may do better."
        )
        theorems = list(dict.fromkeys(one.theorem for one in formal if one.theorem))
        texts.append(f"Bounds follow from: {'; '.join(theorems)}.")
    if any(one.no_prior_psnr is not None for one in formal):
        texts.append(
            "The read-out without prior assumes that all images are equally likely. Medical images are alike, so a "
            "prior-aware attacker may do better than that; it is shown because it needs no knowledge at all."
        )
    accountants = list(dict.fromkeys(one.accountant for one in formal if one.epsilon is not None))
    if accountants:
        texts.append(
            f"Epsilons by: {'; '.join(accountants)}. Rounds are composed; other training on the same images adds to it."
        )
    if any(one.epsilon is not None and one.epsilon > ALWAYS_EPSILON for one in formal):
        texts.append(
            f"An epsilon above {ALWAYS_EPSILON:g} promises next to nothing by itself; there the reconstruction bound says more."
        )
    if any(not promise.guaranteed.formal for promise in found):
        texts.append(
            "Without a formal guarantee only what was measured counts, and it counts for the audited attacks only."
        )
    if any(promise.broken for promise in found):
        texts.append(
            "A measured rate above its bound means that a premise fails: the prior is better than estimated, or noise or "
            "clipping are not what the guarantee says. Do not rely on that guarantee."
        )
    return tuple(texts)


def remarks(found: Sequence[Promise]) -> tuple[str, ...]:
    """What guarantees leave out, once each, with the defenses that say so."""
    said: dict[str, list[str]] = {}
    for promise in found:
        for text in promise.guaranteed.remarks:
            names = said.setdefault(text, [])
            if promise.cells[0].defense not in names:
                names.append(promise.cells[0].defense)
    return tuple(f"{', '.join(names)}: {text}" for text, names in said.items())

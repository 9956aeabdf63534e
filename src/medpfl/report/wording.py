"""Numbers as sentences. No number of an attack stands without its null baseline, and nothing is called safe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medpfl.report import settings
from medpfl.report.classes import class_contrast
from medpfl.report.comparison import Change, DatasetOutcome, DefenseOutcome, closer_by, level
from medpfl.report.formatting import (
    count,
    decimals,
    interval,
    listed,
    percent,
    percent_interval,
)
from medpfl.report.views import Cell, Measured

NULL_NAMES = {
    "nearest": "the most similar other image",
    "class_mean": "the mean image of the class",
    "noise": "noise",
}
"""The null baselines in words."""


def strongest_attack(cell: Cell, threshold: float) -> str:
    """What one attack reconstructed, beside its null baselines."""
    named = f"{cell.attack} against {settings.model(cell)}, with {settings.defense(cell)}"
    return f"{named}: {rate(cell)} with SSIM of at least {threshold:g}; {null_rate(cell)}. {fidelity(cell)}"


def rate(cell: Cell) -> str:
    """The success rate with its interval.

    >>> rate(Cell("c", {}, images=16, asr=Measured(0.875, 0.6875, 1.0)))
    '88% of 16 images (95% interval 69% to 100%)'
    """
    images = len(cell.results) or cell.images
    if cell.asr.value is None:
        return "no success rate"
    share = percent(cell.asr.value)
    found = percent_interval(cell.asr)
    about = f"95% interval {found}" if found else "one victim, so no interval"
    if cell.successes is None:
        return f"{share} of {count(images, 'image')} ({about})"
    return f"{cell.successes} of {count(images, 'image')} ({share}; {about})"


def spread(cell: Cell) -> str:
    """Count and interval of the success rate, for a table that shows the rate itself.

    >>> spread(Cell("c", {}, images=16, asr=Measured(0.875, 0.6875, 1.0)))
    'of 16 images, 95% interval 69% to 100%'
    """
    images = count(len(cell.results) or cell.images, "image")
    number = "" if cell.successes is None else f"{cell.successes} "
    found = percent_interval(cell.asr)
    return f"{number}of {images}, {f'95% interval {found}' if found else 'no interval'}"


def null_rate(cell: Cell) -> str:
    """The success rates of the null baselines.

    >>> null_rate(Cell("c", {}))
    'no null baseline was stored to compare with'
    """
    rates = [(null.asr, NULL_NAMES[name]) for name, null in cell.nulls.items() if null.asr is not None]
    if not rates:
        return "no null baseline was stored to compare with"
    if all(found == 0 for found, _ in rates):
        return (
            "no null baseline reached that for any image" if len(rates) > 1 else f"{rates[0][1]} reached that for none"
        )
    return f"handing over {listed([f'{name} reached that for {percent(found)}' for found, name in rates])}"


def fidelity(cell: Cell) -> str:
    """Mean PSNR and SSIM beside the best null baseline."""
    if cell.psnr.value is None:
        return "No case finished, so there is no mean quality."
    return f"Mean PSNR is {_against(cell)}."


def _against(cell: Cell) -> str:
    spread = interval(cell.psnr)
    value = f"{decimals(cell.psnr.value, 1, 'dB')}{f' ({spread})' if spread else ''}"
    null = cell.best_null
    if null is None or null.psnr is None:
        return f"{value}, with no null baseline to compare with"
    gain = cell.gain_psnr if cell.gain_psnr is not None else (cell.psnr.value or 0.0) - null.psnr
    return f"{value} against {decimals(null.psnr, 1, 'dB')} for {NULL_NAMES[null.name]}, {_more_or_less(gain)}"


def _more_or_less(gain: float) -> str:
    if abs(gain) < 0.05:
        return "which is the same"
    return f"{decimals(abs(gain), 1, 'dB')} {'more' if gain > 0 else 'less'}"


def assumptions(cell: Cell) -> str:
    """Under which assumptions a cell's numbers hold.

    >>> cell = Cell("c", {"threat_model": "insider", "recipe": "fedavg", "model": "resnet", "channel": "plain"})
    >>> assumptions(cell).split(". ")[0]
    'The adversary is the threat model insider'
    """
    model = cell.axes.get("model", "")
    state = settings.model_state(cell.params.get("model", {}))
    crafted = settings.crafted(cell)
    return " ".join(
        (
            f"The adversary is {settings.adversary(cell)}.",
            *([f"It sent {crafted}."] if crafted else []),
            *(f"{text[:1].upper()}{text[1:]}." for text in cell.told),
            f"The client sends {settings.sent(cell)}.",
            f"The model is {model}{f', {state}' if state else ''}.",
            f"{_channel(cell)}.",
        )
    )


def _channel(cell: Cell) -> str:
    found = settings.channel(cell)
    return f"There is {found}" if found.startswith("no ") else f"Updates go through {found}"


def defense_change(found: Change, attack: str) -> str:
    """What a defense changed on the same victims, where `attack` was the strongest against it."""
    before = found.undefended.attack
    compared = "the same attack" if before == attack else before
    return (
        f"Compared with {compared} on the same {count(found.victims, 'victim')} without defense, images reconstructed "
        f"went from {found.successes_before} to {found.successes_after} of {found.images}; {psnr_change(found.psnr)}."
    )


def psnr_change(found: Measured) -> str:
    """A paired difference of mean PSNR as a clause.

    >>> psnr_change(Measured(-12.9, -14.9, -11.0))
    'mean PSNR fell by 12.9 dB (95% interval 11.0 to 14.9)'
    >>> psnr_change(Measured(0.4, -1.0, 1.8))
    'mean PSNR did not clearly change (95% interval −1.0 to 1.8 dB)'
    """
    if found.value is None:
        return "no image was finished in both, so PSNR cannot be compared"
    amount = decimals(abs(found.value), 1, "dB")
    moved = "fell" if found.value < 0 else "rose"
    if found.low is None or found.high is None:
        return f"mean PSNR {moved} by {amount} (too few victims for an interval)"
    if found.low <= 0 <= found.high:
        return f"mean PSNR did not clearly change (95% interval {interval(found)} dB)"
    low, high = sorted((abs(found.low), abs(found.high)))
    return f"mean PSNR {moved} by {amount} (95% interval {decimals(low, 1)} to {decimals(high, 1)})"


def defense_left(outcome: DefenseOutcome) -> str:
    """What is left to the strongest attack against a defense, in words."""
    cell = outcome.strongest
    if cell is None:
        if any(other.blocked for other in outcome.cells):
            return "A guard stopped every case that did not fail."
        if any(other.done for other in outcome.cells):
            return "Only attacks with oracle knowledge finished."
        return "No case has finished."
    return {
        "reconstructed": "Images are still reconstructed." if cell.defended else "Images are reconstructed.",
        "closer": f"No image passes the threshold more surely than a null baseline does, but what comes back is closer "
        f"to the truth than these by {listed(list(closer_by(cell)))}."
        if cell.asr.value
        else "No image passes the threshold, but what comes back is closer to the truth than the null baselines by "
        f"{listed(list(closer_by(cell)))}.",
        "null_level": "Not clearly beyond the null baselines.",
        "unjudged": "No null baseline to judge by.",
        "blocked": "A guard stopped every case that did not fail.",
        "nothing": "No case has finished.",
    }[level(cell)]


def classes_apart(cell: Cell) -> str:
    """That an attack got through to the images of some classes only, and the usual reason; empty if it did not."""
    found = class_contrast(cell)
    if found is None:
        return ""
    whose = f"class {listed(list(found.covered))}"
    text = (
        f"All {count(found.images, 'image')} of {whose} stayed below the null baselines (median PSNR "
        f"{decimals(found.covered_psnr, 1, 'dB')}), all of class {listed(list(found.exposed))} came out above them "
        f"({decimals(found.exposed_psnr, 1, 'dB')})."
    )
    if not cell.defended:
        return text
    return (
        f"{text} A model that already predicts a class sends a small gradient for its images, which noise covers "
        "first: this is no protection for the other classes."
    )


def informed(outcome: DefenseOutcome) -> str:
    """Whether anybody who knows the defense attacked it."""
    if outcome.informed:
        return f"Attacked with knowledge of the defense by {listed(list(outcome.informed))}."
    return "No attack that knows this defense was run; an informed one can do better."


@dataclass(frozen=True)
class DefenseNote:
    """A sentence that holds for several defenses of a data set. `defenses` are their ids; `number` starts at 1."""

    number: int
    text: str
    defenses: tuple[str, ...]
    warning: bool


def defense_notes(outcome: DatasetOutcome, warnings: Mapping[str, Sequence[str]]) -> tuple[DefenseNote, ...]:
    """What must be read beside the defenses of a data set, each sentence once; `warnings` are by id of the defense."""
    found: dict[tuple[str, bool], list[str]] = {}
    for entry in outcome.defenses:
        first = entry.cells[0]
        if not first.defended:
            continue
        if entry.strongest is not None:
            found.setdefault((informed(entry), False), []).append(first.protection)
        for text in warnings.get(first.defense, ()):
            found.setdefault((text, True), []).append(first.defense)
    return tuple(
        DefenseNote(number, text, tuple(dict.fromkeys(defenses)), warning)
        for number, ((text, warning), defenses) in enumerate(found.items(), 1)
    )


def oracle(cell: Cell, threshold: float) -> str:
    """What the strongest attack with oracle knowledge reached, and that it does not count."""
    known = listed([part.replace("_", " ") for part in cell.oracle])
    return (
        f"Knowing the {known}, which a real adversary would not: {strongest_attack(cell, threshold)} "
        "This is an upper bound and is not counted above."
    )

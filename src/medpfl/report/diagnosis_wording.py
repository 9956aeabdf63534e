"""The diagnosis in sentences: what protects the images today, and how thin that protection is."""

from __future__ import annotations

from collections.abc import Sequence

from medpfl.report.diagnosis import ALL, Diagnosis, Effect
from medpfl.report.formatting import DASH, count, decimals, interval, listed, percent, signed
from medpfl.report.views import Cell


def protection(effect: Effect) -> str:
    """What protects the images as they are, as a noun."""
    cell = effect.base
    return {
        "labels_given": "labels that must be inferred",
        "masks_given": "masks that the attacker does not know",
        "recipe_known": "a recipe that the attacker does not know",
        "batch_norm_eval": "batch norm in train mode",
        "plain_gradient": "local training before anything is sent",
        "batch_size_1": "batches of several images",
        "untrained": "the trained weights",
        "no_defense": f"the defense {cell.defense}",
        "clean_update": "what the recorded update has beyond the client's step (a defense, a compression, another recipe)",
        "no_guard": f"the guard {cell.axes.get('guard', '')}",
        "plain_channel": f"the channel {cell.axes.get('channel', '')}",
        ALL: "all of these conditions together",
    }.get(effect.change, effect.change)


def changed(effect: Effect) -> str:
    """What was changed in the attacker's favor, for a table."""
    return {
        "labels_given": "true labels given",
        "masks_given": "true masks given",
        "recipe_known": "recipe known",
        "batch_norm_eval": "batch norm in eval mode",
        "plain_gradient": "plain gradient of one batch",
        "batch_size_1": "batch size 1",
        "untrained": "untrained model",
        "no_defense": "no defense",
        "clean_update": "the client's step and nothing else",
        "no_guard": "no guard",
        "plain_channel": "plain channel",
        ALL: "all of these together",
    }.get(effect.change, effect.change)


def headline(found: Diagnosis) -> str:
    """The verdict in a few words."""
    return {
        "open": "Nothing: the attack succeeds as it is",
        "limited": protection(found.key) if found.key else "",
        "together": "Several conditions that hide each other",
        "unexplained": "None of the conditions that were tried",
        "unsure": "Cannot be told",
        "bare": "No condition is left to take away",
    }.get(found.verdict, found.verdict)


def paragraph(found: Diagnosis) -> str:
    """The verdict in plain sentences."""
    key = found.key
    if found.verdict == "open":
        return f"Nothing limits this attack: {as_it_is(found.cell)} come back as it is."
    if found.verdict == "bare":
        return (
            "There is no condition to take away: this cell is already as kind to the attacker as the sweep can make "
            "it. What keeps images from coming back is the attack's budget or method, and no protection."
        )
    if found.verdict == "unsure":
        return _unsure(found)
    if found.verdict == "limited" and key is not None:
        remark = f" {_REMARKS[key.change]}" if key.change in _REMARKS else ""
        return (
            f"What protects these images most today: {protection(key)}. Without it {_gain(key)}. "
            f"{_thinness(found)}{remark}"
        )
    if found.verdict == "together" and key is not None:
        return (
            f"No single change makes this attack clearly stronger, but all of them together do: {_gain(key)}. The "
            "conditions hide each other, so taking one away shows little of what the others still cover."
        )
    return (
        "None of the changes makes this attack clearly stronger, not even all of them together. What limits it lies "
        "elsewhere (its budget, the net, the images) and is no protection to rely on."
        if any(effect.change == ALL for effect in found.effects)
        else "The change that was tried does not make this attack clearly stronger. What limits it lies elsewhere (its "
        "budget, the net, the images) and is no protection to rely on."
    )


def brief(found: Diagnosis) -> str:
    """The verdict with its figures in one line, for a terminal."""
    key = found.key
    if key is None or not key.measured:
        return headline(found)
    spread = interval(key.psnr)
    return (
        f"{headline(found)}: without, PSNR {signed(key.psnr.value, 1, 'dB')}{f' [{spread}]' if spread else ''}, "
        f"{key.successes[0]} -> {key.successes[1]} of {count(key.images, 'image')}"
    )


def in_words(effect: Effect) -> str:
    """What one change says about its condition."""
    if effect.status == "refused":
        return f"Not possible: {effect.reason}"
    if not effect.measured:
        return "Not computed yet."
    oracle = " A real adversary does not have this (oracle)." if effect.oracle else ""
    if effect.direction > 0:
        return f"Protects: without it {_outcome(effect)}.{oracle}"
    if effect.direction < 0:
        return f"Does not protect: without it the attack does worse.{oracle}"
    return f"No clear effect by itself.{oracle}"


def facts(found: Diagnosis) -> tuple[str, ...]:
    """What the attack itself told, and what must be said about the numbers."""
    texts = []
    if found.label_accuracy is not None:
        texts.append(f"Labels that the attack inferred were right for {percent(found.label_accuracy)} of the images.")
    if found.notes:
        texts.append(f"The attack's own notes: {_counted(found.notes)}.")
    if found.stop_reasons:
        texts.append(f"Its searches ended because: {_counted(found.stop_reasons)}.")
    compared = [effect for effect in found.effects if effect.measured]
    if compared:
        victims = sorted({effect.victims for effect in compared})
        number = count(victims[0], "victim") if len(victims) == 1 else f"{victims[0]} to {victims[-1]} victims"
        texts.append(
            f"Compared on the same {number}; so few give rough intervals, and one in twenty intervals leaves out zero "
            "by chance."
        )
    return tuple(texts)


_REMARKS = {
    "labels_given": "A real adversary does not have them (oracle), but may infer them better than this attack does.",
    "masks_given": "A real adversary does not have them (oracle), but may guess them.",
    "recipe_known": "A server that sets the recipe knows it.",
    "untrained": "Whoever sends the weights can send untrained ones.",
}
"""Who can take a protection away."""


def _gain(effect: Effect) -> str:
    spread = interval(effect.psnr)
    moved = "rises" if (effect.psnr.value or 0.0) >= 0 else "falls"
    quality = (
        f"mean PSNR {moved} by {decimals(abs(effect.psnr.value), 1, 'dB')}{f' [{spread}]' if spread else ''} and "
        if effect.psnr.value is not None
        else ""
    )
    return f"{quality}{_outcome(effect)}"


def _outcome(effect: Effect) -> str:
    before, after = effect.successes
    return f"{after} of {count(effect.images, 'image')} come back instead of {before}"


def _thinness(found: Diagnosis) -> str:
    key = found.key
    assert key is not None  # the caller sees to that
    before, after = key.successes
    if after * 2 >= key.images:
        return "That is all that stands in the way: a protection that one setting removes is thin."
    together = next((effect for effect in found.effects if effect.change == ALL and effect.measured), None)
    more = "" if together is None else f" With all conditions taken away at once, {_outcome(together)}."
    if after > before:
        return f"Some images depend on this one setting.{more}"
    return f"Even so, no image more passes the threshold: something else covers them too.{more}"


def _unsure(found: Diagnosis) -> str:
    if found.cell.status == "partial" or any(effect.status == "partial" for effect in found.effects):
        return "The sweep is not finished, so nothing can be said yet."
    victims = max((effect.victims for effect in found.effects), default=0)
    if victims == 0:
        reasons = list(dict.fromkeys(effect.reason for effect in found.effects if effect.reason))
        return f"Nothing could be compared{f': {listed(reasons)}' if reasons else ''}."
    return f"{count(victims, 'victim')} are too few to tell a difference from chance."


def as_it_is(cell: Cell) -> str:
    """How many images come back as it is."""
    images = len(cell.results) or cell.images
    if cell.asr.value is None or not images:
        return DASH
    return f"{cell.successes if cell.successes is not None else percent(cell.asr.value)} of {count(images, 'image')}"


def _counted(texts: Sequence[tuple[str, int]]) -> str:
    return "; ".join(f"{text} ({count(cases, 'case')})" for text, cases in texts)

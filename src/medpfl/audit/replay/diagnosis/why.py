"""Why an attack failed or worked on one update, from the same attack under controlled changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medpfl.audit.diagnosis import ALL
from medpfl.audit.replay.diagnosis.subject import Fact, plural

Row = Mapping[str, Any]

WORDS = {
    "labels_given": "the true labels given",
    "recipe_known": "the client's own recipe known",
    "clean_update": "nothing on the update beyond the client's step",
    "batch_norm_eval": "batch norm in eval mode",
    "plain_gradient": "one plain gradient instead of local training",
    "batch_size_1": "one image per step",
    "untrained": "a freshly drawn model",
    "plain_channel": "the first client's own update instead of the mean",
    ALL: "all of these together",
}
"""A change as a condition, in the order in which they are told."""


def why(attack: str, rows: Sequence[Row], changes: Mapping[str, Sequence[Row]]) -> Fact:
    """What made the attack work or fail on one update, as far as the changes tell.

    rows: those of the case as it was recorded, with scores. changes: name of a change -> rows of the same case under it.
    """
    done = {name: found for name, found in changes.items() if found and found[0]["status"] == "done"}
    before = _told(rows)
    if _all(rows):
        return Fact("why:works", f"It works on the update as it is: {before}.", 1.0, "helps", attack)
    if not changes:
        return Fact("why:bare", f"As recorded {before}. There is no condition to change.", 0.0, "neutral", attack)
    if not done:
        reasons = "; ".join(dict.fromkeys(str(found[0]["reason"]) for found in changes.values() if found))
        return Fact(
            "why:unfinished", f"As recorded {before}. No changed case finished: {reasons}.", 0.0, "neutral", attack
        )
    alone = [name for name in WORDS if name in done and name != ALL and _better(rows, done[name])]
    tried = ", ".join(WORDS[name] for name in WORDS if name in done)
    if alone:
        cause = "+".join(alone)
        listed = "; ".join(f"{WORDS[name]}: {_told(done[name])}" for name in alone)
        text = f"As recorded {before}. What it takes, each alone: {listed}."
    elif ALL in done and _better(rows, done[ALL]):
        cause = ALL
        text = f"As recorded {before}. No change alone brings more back, all together do: {_told(done[ALL])}."
    else:
        cause = "unexplained"
        best = max(done, key=lambda name: _mean(done[name]))
        text = (
            f"As recorded {before}. None of the changes brings an image back ({tried}); the closest is {WORDS[best]}: "
            f"{_told(done[best])}. What still limits it there is the attack's method or budget."
        )
    return Fact(f"why:{cause}", text, float(sum(bool(row["success"]) for row in rows)) / len(rows), "hinders", attack)


def _all(rows: Sequence[Row]) -> bool:
    return all(bool(row["success"]) for row in rows)


def _better(before: Sequence[Row], after: Sequence[Row]) -> bool:
    """Whether a larger share of the images comes back."""
    return _rate(after) > _rate(before)


def _rate(rows: Sequence[Row]) -> float:
    return sum(bool(row["success"]) for row in rows) / len(rows)


def _mean(rows: Sequence[Row]) -> float:
    values = [float(row["ssim"]) for row in rows if row.get("ssim") is not None]
    return sum(values) / len(values) if values else 0.0


def _told(rows: Sequence[Row]) -> str:
    """Images that came back, and their mean SSIM.

    >>> _told([{"success": True, "ssim": 0.95}, {"success": False, "ssim": 0.35}])
    '1 of 2 images come back (mean SSIM 0.65)'
    """
    found = sum(bool(row["success"]) for row in rows)
    return f"{found} of {plural(len(rows), 'image')} {'comes' if len(rows) == 1 else 'come'} back (mean SSIM {_mean(rows):.2f})"

"""What each change of the diagnosis did to an attack, image by image, and which condition therefore limits it most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from medpfl.audit.diagnosis import ALL
from medpfl.metrics.statistics import paired_difference

OPEN = 0.9
"""Success rate from which nothing limits an attack any more."""

FEWEST_VICTIMS = 4
"""With fewer victims than these, differences cannot be told from chance."""

Row = Mapping[str, Any]
_IMAGE = ["seed", "victim", "client", "position"]


def diagnosis(changes: Sequence[Row], cells: Mapping[str, Row], results: pd.DataFrame) -> list[dict[str, Any]]:
    """For `summary.json`: an entry per diagnosed cell with the effect of each change and the verdict.

    changes: mappings with `cell`, `change` and `changed` (ids of cells). cells: rows of `cells.csv` by id. results:
    rows of `results.csv`. Differences are changed minus as it is, over the private images that both cells met.
    `verdict` is one of

    - `open`: the attack succeeds as it is (`OPEN`); nothing limits it.
    - `limited`: `limit` names the change with the largest gain in success, or else in PSNR, of those whose interval
      lies above zero.
    - `together`: none does by itself, but all of them together do.
    - `unexplained`: not even these do.
    - `unsure`: the sweep is not finished, or met fewer than `FEWEST_VICTIMS` victims.
    - `bare`: there is no condition to take away.
    """
    groups = dict(list(results.groupby("cell"))) if len(results) else {}
    found = []
    for base, row in cells.items():
        if row.get("diagnosis_of") or row["status"] == "refused":
            continue
        effects = [
            _effect(change["change"], cells[change["changed"]], groups.get(base), groups.get(change["changed"]))
            for change in changes
            if change["cell"] == base
        ]
        verdict, limit = _verdict(row, effects)
        found.append(
            {
                "cell": base,
                "verdict": verdict,
                "limit": limit,
                "label_accuracy": row.get("label_accuracy"),
                "notes": _tally(groups.get(base), "notes"),
                "stop_reasons": _tally(groups.get(base), "stop_reason"),
                "changes": effects,
            }
        )
    return found


def _effect(name: str, cell: Row, before: pd.DataFrame | None, after: pd.DataFrame | None) -> dict[str, Any]:
    """What one change did."""
    effect: dict[str, Any] = {
        "change": name,
        "cell": cell["cell"],
        "status": cell["status"],
        "reason": cell.get("reason"),
        "oracle": cell["oracle"],
        "victims": 0,
        "images": 0,
    }
    if before is None or after is None:
        return effect
    pairs = before.merge(after, on=_IMAGE, suffixes=("_before", "_after"))
    victims = pairs["seed"].astype(str) + "/" + pairs["victim"].astype(str)
    effect |= {"victims": int(victims.nunique()), "images": len(pairs)}
    for metric in ("success", "psnr", "ssim"):
        first, second = (pd.to_numeric(pairs[f"{metric}_{when}"]).astype("float64") for when in ("before", "after"))
        both = first.notna() & second.notna()
        mean = paired_difference(second[both], first[both], victims[both], seed=0)
        effect[metric] = {
            "before": float(first[both].mean()) if both.any() else None,
            "after": float(second[both].mean()) if both.any() else None,
            "difference": mean.mean,
            "low": mean.low,
            "high": mean.high,
        }
    return effect


def _verdict(row: Row, effects: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    rate = row.get("asr")
    if rate is not None and rate >= OPEN and row["status"] == "done":
        return "open", None
    if not effects:
        return "bare", None
    if row["status"] != "done" or any(effect["status"] == "partial" for effect in effects):
        return "unsure", None
    counted = [effect for effect in effects if effect["victims"] >= FEWEST_VICTIMS]
    if not counted:
        return "unsure", None
    gains = {effect["change"]: gain for effect in counted if (gain := _gain(effect)) > (0.0, 0.0)}
    single = {name: gain for name, gain in gains.items() if name != ALL}
    if single:
        return "limited", max(single, key=lambda name: single[name])
    return ("together", ALL) if ALL in gains else ("unexplained", None)


def _gain(effect: Mapping[str, Any]) -> tuple[float, float]:
    """Gain in success and in PSNR, each zero unless its interval lies above zero."""

    def sure(metric: str) -> float:
        low, difference = effect[metric]["low"], effect[metric]["difference"]
        return float(difference) if low is not None and low > 0 else 0.0

    return sure("success"), sure("psnr")


def _tally(rows: pd.DataFrame | None, column: str) -> list[dict[str, Any]]:
    """The texts of a column with the number of cases that have them, the most frequent first."""
    if rows is None or column not in rows:
        return []
    texts = rows.drop_duplicates("case")[column].dropna()
    counted = Counter(text for entry in texts for text in entry.split("; ") if text)
    return [{"text": text, "cases": cases} for text, cases in counted.most_common(5)]

"""The answer of an audit in sentences: over all data sets, for one of them, and how complete it is."""

from __future__ import annotations

from medpfl.report.comparison import DatasetOutcome, Level, level
from medpfl.report.formatting import count, decimals, listed, percent
from medpfl.report.views import Audit, Cell
from medpfl.report.wording import NULL_NAMES

LEVEL_NAMES: dict[Level, str] = {
    "reconstructed": "Images reconstructed",
    "closer": "More than the null baselines",
    "null_level": "Not beyond the null baselines",
    "unjudged": "Cannot be judged",
    "unscored": "No ground truth, no scores",
    "blocked": "Stopped by a guard",
    "nothing": "Nothing measured",
}
"""What stands on the label of a data set."""


def overall(found: tuple[DatasetOutcome, ...], noun: str = "data set") -> str:
    """The answer over all data sets in one or two sentences; `noun` is what they are called."""
    if not found:
        return "There is no result yet."
    if all(cell.refused for outcome in found for cell in outcome.cells):
        return (
            "Nothing was measured: every combination was refused, for the reasons given below. "
            "This says nothing about what could be reconstructed."
        )
    judged = [outcome for outcome in found if outcome.strongest is not None]
    if not judged and any(outcome.level == "unscored" for outcome in found):
        return (
            "No score is claimed: nobody gave the private images. Below stand the pictures that attacks made of the "
            "updates, and how well each explains its update. Whoever owns the images can compare them."
        )
    if not judged:
        return "Nothing can be said about a real adversary yet: no attack without oracle knowledge finished."
    given = [outcome.dataset for outcome in judged if outcome.level == "reconstructed"]
    closer = [outcome.dataset for outcome in judged if outcome.level == "closer"]
    unknown = [outcome.dataset for outcome in found if outcome.level in ("unjudged", "blocked", "nothing")]
    several = len(found) > 1
    parts = []
    if given:
        where = f" in {len(given)} of {len(found)} {noun}s ({listed(given)})" if several else ""
        parts.append(f"Private images could be reconstructed from what clients send{where}.")
    if closer:
        where = f" from {listed(closer)}" if several else ""
        parts.append(f"No image{where} counts as reconstructed, but more was shown than the null baselines show.")
    if len(given) + len(closer) + len(unknown) < len(found):
        where = f" on {listed([o.dataset for o in found if o.level == 'null_level'])}" if several else ""
        parts.append(
            f"No attack without oracle knowledge went clearly beyond the null baselines{where}. "
            "This does not show that updates are safe to send."
        )
    if unknown:
        parts.append(
            f"Nothing can be said{f' about {listed(unknown)}' if several else ''}: no result there could be judged."
        )
    return " ".join(parts)


def headline(outcome: DatasetOutcome) -> str:
    """One sentence about a data set, for the strongest attack without oracle knowledge."""
    cell = outcome.strongest
    if cell is None:
        return _headline_without_result(outcome)
    rate = cell.asr.value or 0.0
    found = level(cell)
    if found == "reconstructed":
        return f"{'All' if rate >= 1 else 'Most' if rate >= 0.5 else 'Some'} images could be reconstructed."
    if found == "unjudged":
        return "Something came back, but no null baseline was stored, so the numbers cannot be judged."
    passed = (
        "The attack passed the threshold no more surely than the null baselines"
        if rate
        else "No image passed the threshold"
    )
    if found == "closer":
        return f"{passed}, but what came back shows more of the private images than the null baselines do."
    return f"{passed}, and what came back is not clearly closer to the truth than the null baselines."


def _headline_without_result(outcome: DatasetOutcome) -> str:
    cells = outcome.cells
    if outcome.level == "unscored":
        came = sum(any(result.reconstruction_image for result in cell.results) for cell in cells)
        return (
            f"Pictures came back in {came} of {count(len(cells), 'cell')}. Without ground truth nobody can say from this "
            "page whether they show patients; a picture that looks like one should be taken as one."
        )
    if cells and all(cell.refused for cell in cells):
        return "Every combination was refused before anything was computed, so nothing is known."
    if outcome.strongest_oracle is not None:
        return "Only attacks with oracle knowledge finished, so nothing is known about a real adversary."
    if any(cell.blocked for cell in cells):
        return "A guard stopped every case that was not refused or failed: the adversary received nothing from these."
    if any(cell.failed for cell in cells):
        return "Every case that was tried failed, so nothing is known. A failed attack is not a weak one."
    return "No case has finished, so nothing is known yet."


def caution_null(outcome: DatasetOutcome, threshold: float) -> str:
    """How far an unrelated image of the same kind already comes; empty if no such baseline was stored."""
    first = () if outcome.strongest is None else (outcome.strongest,)
    found = [
        cell.nulls[name]
        for name in ("nearest", "class_mean")
        for cell in (*first, *outcome.cells)
        if name in cell.nulls
    ]
    null = next((null for null in found if null.ssim is not None and null.psnr is not None), None)
    if null is None:
        return ""
    passed = "" if null.asr is None else f", and passes the threshold of {threshold:g} for {percent(null.asr)}"
    return (
        f"Read these numbers against this one: {NULL_NAMES[null.name]}, which owes nothing to any update, already "
        f"scores a mean SSIM of {decimals(null.ssim)} and {decimals(null.psnr, 1, 'dB')} here{passed}."
    )


def unfinished(cells: tuple[Cell, ...]) -> str:
    """Failed, blocked and refused parts of a data set; empty if there are none."""
    failed, blocked = (sum(cell.cases(status) for cell in cells) for status in ("failed", "blocked"))
    refused = sum(cell.refused for cell in cells)
    partial = sum(cell.status == "partial" for cell in cells)
    parts = []
    if failed:
        parts.append(
            f"{count(failed, 'case')} failed; {'its' if failed == 1 else 'their'} images count as not reconstructed "
            "and stand outside the means."
        )
    if blocked:
        parts.append(f"{count(blocked, 'case')} {'was' if blocked == 1 else 'were'} stopped by a guard.")
    if refused:
        parts.append(f"{count(refused, 'cell')} {'was' if refused == 1 else 'were'} refused as not possible.")
    if partial:
        parts.append(f"{count(partial, 'cell')} {'is' if partial == 1 else 'are'} not finished yet.")
    return " ".join(parts)


def completeness(audit: Audit) -> str:
    """Whether the audit is complete."""
    cases, done, failed, blocked = (audit.count(name) for name in ("cases", "done", "failed", "blocked"))
    tail = [
        text
        for number, text in ((failed, f"{failed:,} failed"), (blocked, f"{blocked:,} stopped by a guard"))
        if number
    ]
    extra = f", {', '.join(tail)}" if tail else ""
    refused = audit.count("refused")
    refusals = (
        f" {count(refused, 'cell')} {'was' if refused == 1 else 'were'} refused as not possible." if refused else ""
    )
    if audit.finished and cases == 0:
        return f"The audit is complete, but no case could be computed.{refusals}"
    if audit.finished:
        return f"The audit is complete: {done:,} of {count(cases, 'case')} finished{extra}.{refusals}"
    return (
        f"This audit is not complete: {done:,} of {count(cases, 'case')} finished so far{extra}. "
        f"The numbers below will change.{refusals}"
    )


def limit(audit: Audit) -> str:
    """Whether the limit that the user calls acceptable holds; empty if there is none."""
    if not audit.limit_text:
        return ""
    if audit.limit_holds is None:
        return f"Whether the limit {audit.limit_text} holds cannot be said: no finished cell has this number."
    if not audit.limit_holds:
        return f"The limit {audit.limit_text} does not hold: at least one cell is beyond it."
    where = "finished cell" if audit.finished else "cell with a result"
    return f"The limit {audit.limit_text} holds in every {where}, for the attacks and settings of this audit."

"""The page and the figure of the guards measured as a detector, from the rows of the runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

from detector.forms import TRICKS
from detector.honest import STAGES, VARIANT_MAKERS
from detector.plan import ZOO, ZOO_SLOW
from detector.rates import (
    LOOKS,
    Rate,
    called,
    leaks_by_design,
    left_out,
    predictive_value,
    rate,
    suspicion,
    total,
)
from detector.rows import Row

POINTS = {"1%": 0.01, "0.1%": 0.001}
BASES = {"1 in 10": 0.1, "1 in 1,000": 0.001}
READ = 0.1
"""From this share of recovered images on a crafted run counts as one that reads."""

OWN_LOOKS = tuple(LOOKS)[:4]
"""The looks for which nobody needs to know more than came."""

Table = list[tuple[str, ...]]


def write_page(rows: Sequence[Row], folder: Path) -> None:
    """`guards.md` and `guards.png` in the folder."""
    honest, crafted, adaptive = (
        [row for row in rows if row.kind == kind] for kind in ("honest", "crafted", "adaptive")
    )
    parts = [
        TITLE.format(honest=len(honest), crafted=len(crafted), adaptive=len(adaptive)),
        "## Verdicts with the shipped thresholds\n",
        _markdown(_shipped(honest, crafted)),
        LEAKS.format(design=_leaks(honest), unusable=rate(row.gate == "unusable" for row in honest)),
        "## False alarms by architecture, detection by family\n",
        _markdown(_by_architecture(honest)),
        _markdown(_by_family(crafted)),
        _markdown(_by_treatment(honest)),
        "## Thresholds from other models\n",
        OTHERS.format(honest=len(honest), rank=_rank(honest)),
        _markdown(_others(honest, crafted)),
        BY_GROUP,
        _markdown(_groups_left_out(honest, crafted)),
        "## What a verdict is worth\n",
        _markdown(_values(honest, crafted)),
        "## Attackers who know every check\n",
        ADAPTIVE,
        _markdown(_adaptive(adaptive)),
        "![Recovery against suspicion](guards.png)\n",
    ]
    (folder / "guards.md").write_text("\n".join(parts), encoding="utf-8")
    _figure(adaptive, folder / "guards.png")


TITLE = """# The guards measured as a detector

One run is one net with its own seed, images and recipe: {honest} honest ones, {crafted} crafted ones, {adaptive} of
attackers who know the checks. Three looks: at the `tensors` that came, at the `model at work` on 16 of the client's own
images (with the tensors), and at the `update` before it is sent. `all three` is an alarm if any look gives one, without
being told which architecture was agreed on. Two more columns say what a client that knows more adds to them: `and the
agreed model`, of its own build, into which the tensors must fit; `and a reference`, the model of the round before (of
honest runs: what the client's own update makes of the model, compared with it; of crafted ones: the honest body).

    python benchmarks/guards_detector.py measure --data ../shared/data --first 3 --only crafted --minutes 60
    python benchmarks/guards_detector.py measure --data ../shared/data --first 3 --only adaptive --minutes 60
    python benchmarks/guards_detector.py measure --data ../shared/data --first 3 --repeats 3 --only honest --minutes 60
    python benchmarks/guards_detector.py table

What these figures do not show: rounds of a real federation, long training, images larger than 32x32, attacks that are not among
the families. Runs draw from the same few sets of images, so they are independent in nets and draws, not in hospitals.
Nets outside the zoo are those on which no threshold was fixed; the small dense ones are much like some on which it was.
Every front of dense layers before a convolution counts as crafted (`front_layers`), which is why `tensors` do so well
against families that add one.

All runs are of repeats (`--first 3` and later) whose seeds no change of the guards had seen before. Limits were fixed on
the zoo and the nets of `tests`, the newest ones (`one_sided_*`, `class_offsets`, and when an update is `unusable`) on 240
dense nets of other widths, activations and recipes, on traps beside them, and on repeats 0 to 2.

Intervals are exact (Clopper-Pearson, 95%). Images are 28x28 and 32x32, from small real sets and drawings, batches of 8 to 64.
"""

LEAKS = """
Nets whose first layer is dense leak without being crafted. That the guards say `leaks` of them is right and no false
alarm: {design}. Only `crafted` counts as an alarm above. Honest updates that were withheld as `unusable`, because training
diverged: {unusable}.
"""

OTHERS = """Every check's score has a distance to its shipped threshold, from -1 (no sign) to 1; a run's suspicion is the
sum of those above 0, or the largest if none is. From which suspicion on a run is an alarm was fixed without the architecture (false alarms) or the attack family
(detection) that it is then counted on, in turn: at the rank that lets 1% or 0.1% of fresh honest runs through, and half
of the way from there to the crafted runs. A rank for 0.1% needs 999 honest runs; there are {honest}, so it is {rank}.
"""

BY_GROUP = """Left out one by one at 0.1%: every family, and the architectures with a false alarm at either point.
"""

ADAPTIVE = """Bins in front of a body (32 images, 256 units unless said otherwise), shuffled and rescaled with rank-1
columns except `plain`; `own_...` are traps in the first layer of a net that is dense first anyway. Recovered: share of
all images above 30 dB, by the attacker's own ranking. Columns: share of runs that a look calls `crafted`.
"""


def _shipped(honest: Sequence[Row], crafted: Sequence[Row]) -> Table:
    reading = [row for row in crafted if row.recovered >= READ]
    strange = [row for row in honest if row.group not in (*ZOO, *ZOO_SLOW)]
    table = [
        (
            "look",
            "false alarms",
            "of nets outside the zoo",
            "detected",
            f"detected, of runs that read {READ:.0%} or more",
        )
    ]
    for look in LOOKS:
        table.append((look, *(str(_alarms(part, look)) for part in (honest, strange, crafted, reading))))
    return table


def _alarms(rows: Sequence[Row], look: str) -> Rate:
    return rate(called(row, look, "crafted") for row in rows)


def _noticed(rows: Sequence[Row]) -> Rate:
    return rate(called(row, "all three", "crafted") or called(row, "all three", "leaks") for row in rows)


def _leaks(honest: Sequence[Row]) -> str:
    parts = {"dense first": True, "others": False}
    found = {
        name: rate(called(row, "all three", "leaks") for row in honest if leaks_by_design(row) == dense)
        for name, dense in parts.items()
    }
    return "; ".join(f"{name}: {value}" for name, value in found.items())


def _by_architecture(honest: Sequence[Row]) -> Table:
    table = [("architecture", "runs", *LOOKS, "called `leaks`")]
    for group in sorted({row.group for row in honest}):
        part = [row for row in honest if row.group == group]
        leaks = rate(called(row, "all three", "leaks") for row in part)
        table.append((group, str(len(part)), *(str(_alarms(part, look).hits) for look in LOOKS), str(leaks.hits)))
    return table


def _by_treatment(honest: Sequence[Row]) -> Table:
    table = [("stage or treatment", "runs", *(f"{look}" for look in LOOKS))]
    for place, names in enumerate((STAGES, VARIANT_MAKERS)):
        for name in names:
            part = [row for row in honest if row.detail.split()[place] == name]
            table.append((name, str(len(part)), *(str(_alarms(part, look).hits) for look in LOOKS)))
    return table


def _by_family(crafted: Sequence[Row]) -> Table:
    table = [("family", "runs", "recovered, mean", *LOOKS, "all three, `crafted` or `leaks`")]
    for group in sorted({row.group for row in crafted}):
        part = [row for row in crafted if row.group == group]
        mean = fmean(row.recovered for row in part)
        table.append(
            (
                group,
                str(len(part)),
                f"{mean:.2f}",
                *(str(_alarms(part, look).hits) for look in LOOKS),
                str(_noticed(part).hits),
            )
        )
    return table


def _others(honest: Sequence[Row], crafted: Sequence[Row]) -> Table:
    table = [("look", "point", "false alarms, architecture left out", "worst", "detected, family left out", "worst")]
    for look in LOOKS:
        for name, alarms in POINTS.items():
            false, found = left_out(honest, crafted, look, alarms)
            worst = max(false, key=lambda group: false[group].value), min(found, key=lambda group: found[group].value)
            table.append(
                (
                    look,
                    name,
                    str(total(false)),
                    f"{worst[0]} {false[worst[0]].value:.0%}",
                    str(total(found)),
                    f"{worst[1]} {found[worst[1]].value:.0%}",
                )
            )
    return table


def _rank(honest: Sequence[Row]) -> str:
    fewest = len(honest) - max(sum(row.group == group for row in honest) for group in {row.group for row in honest})
    return "a real rank" if fewest >= 999 else "extrapolated from an exponential tail through the highest tenth"


def _groups_left_out(honest: Sequence[Row], crafted: Sequence[Row]) -> Table:
    table = [("left out", *OWN_LOOKS)]
    rates = {(look, point): left_out(honest, crafted, look, point) for look in OWN_LOOKS for point in POINTS.values()}
    alarms = {group for false, _ in rates.values() for group, found in false.items() if found.hits}
    strict = {look: rates[look, POINTS["0.1%"]] for look in OWN_LOOKS}
    for group in sorted({row.group for row in crafted}):
        table.append((f"{group}: detected", *(str(strict[look][1][group]) for look in OWN_LOOKS)))
    for group in sorted(alarms):
        table.append((f"{group}: false alarms", *(str(strict[look][0][group]) for look in OWN_LOOKS)))
    return table


def _values(honest: Sequence[Row], crafted: Sequence[Row]) -> Table:
    table = [
        ("look", *(f"{base} crafted" for base in BASES), *(f"{base}, at the intervals' worse ends" for base in BASES))
    ]
    for look in LOOKS:
        false, found = _alarms(honest, look), _alarms(crafted, look)
        likely = [f"{predictive_value(found.value, false.value, base):.1%}" for base in BASES.values()]
        careful = [f"{predictive_value(found.bounds[0], false.bounds[1], base):.1%}" for base in BASES.values()]
        table.append((look, *likely, *careful))
    return table


def _adaptive(adaptive: Sequence[Row]) -> Table:
    table = [("trick", "what its strength is", "strength", "runs", "recovered", *LOOKS, "`crafted` or `leaks`")]
    for name, trick in TRICKS.items():
        for strength in trick.strengths:
            part = [row for row in adaptive if row.group == name and row.strength == strength]
            if part:
                shares = [f"{_alarms(part, look).value:.0%}" for look in LOOKS]
                shares.append(f"{_noticed(part).value:.0%}")
                table.append(
                    (
                        name,
                        trick.meaning,
                        f"{strength:g}",
                        str(len(part)),
                        f"{fmean(row.recovered for row in part):.2f}",
                        *shares,
                    )
                )
    return table


def _figure(adaptive: Sequence[Row], path: Path) -> None:
    figure, panels = plt.subplots(1, len(OWN_LOOKS), figsize=(15, 4.2), sharey=True, layout="constrained")
    for panel, look in zip(panels, OWN_LOOKS, strict=True):
        for number, (name, trick) in enumerate(TRICKS.items()):
            groups = [
                [row for row in adaptive if row.group == name and row.strength == strength]
                for strength in trick.strengths
            ]
            points = [
                (fmean(suspicion(row, look) for row in part), fmean(row.recovered for row in part))
                for part in groups
                if part
            ]
            if points:
                marker = "osv^D<>"[number % 7]
                panel.plot(
                    *zip(*points, strict=True), marker=marker, color=f"C{number % 10}", label=name.replace("_", " ")
                )
        panel.axvline(0.0, color="black", linestyle=":", linewidth=1)
        panel.set(title=look, xlabel="suspicion (0: the shipped threshold)", xlim=(-1.05, 8.0), ylim=(-0.03, 1.03))
    panels[0].set_ylabel("share of images above 30 dB")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _markdown(table: Table) -> str:
    head, *rest = table
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(row)} |" for row in rest)]
    return "\n".join(lines) + "\n"

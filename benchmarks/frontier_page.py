"""The price of protection of a finished audit as a table, a CSV file and a figure for the documentation.

    medpfl audit examples/frontier_brain.yaml --out out/frontier_brain
    python benchmarks/frontier_page.py out/frontier_brain --to docs/benchmarks --name utility

Writes NAME.csv and NAME.png and puts the table into NAME.md between the lines `<!-- table -->` and `<!-- end -->`, where
that file has them; else prints it. `--limit` judges by another limit than the audit's own.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg

from medpfl.audit.limits import parse_limit
from medpfl.audit.prices import Frontier, Priced, Span
from medpfl.report.figures import SETTINGS
from medpfl.report.frontier import LEAKAGE, sections, styles_of
from medpfl.report.frontier_figure import frontier_figure
from medpfl.report.loading import load_audit

BEGIN, END = "<!-- table -->", "<!-- end -->"


def main() -> None:
    """Writes all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of an audit with utility")
    parser.add_argument("--to", type=Path, default=Path("docs/benchmarks"), help="folder (docs/benchmarks)")
    parser.add_argument("--name", default="utility", help="name of the files (utility)")
    parser.add_argument("--limit", help="such as 'ssim <= 0.5'; default the audit's own")
    chosen = parser.parse_args()
    audit = load_audit(chosen.folder, parse_limit(chosen.limit, "--limit") if chosen.limit else None)
    if not audit.frontiers:
        parser.error(f"{chosen.folder}: has no utility; run medpfl audit --utility first")
    found, section = audit.frontiers[0], sections(audit)[0]
    lines = [
        "| no. | defense | what leaks | attacker | AUC | against none | balanced accuracy | epsilon | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in section.lines:
        parts = (
            str(line.number),
            line.defense,
            f"{line.leakage} ({line.leakage_interval})",
            line.attacker,
            f"{line.auc} ({line.auc_interval})",
            f"{line.lost} ({line.lost_interval})" if line.lost_interval else line.lost,
            f"{line.balanced_accuracy} ({line.balanced_accuracy_interval})",
            line.epsilon,
            f"**{line.verdict}**" if line.recommended else line.verdict,
        )
        lines.append(f"| {' | '.join(parts)} |")
    table = "\n".join(
        [*lines, "", found.advice, "", f"Clients alone: AUC {section.alone}; guessing {section.guessing}."]
    )
    page = chosen.to / f"{chosen.name}.md"
    text = page.read_text() if page.is_file() else ""
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}")
    else:
        print(table)
    write_csv(found, chosen.to / f"{chosen.name}.csv")
    with rc_context(SETTINGS):
        figure = frontier_figure(found, styles_of(found), LEAKAGE.get(found.column, (found.column,))[0])
        FigureCanvasAgg(figure)
        figure.savefig(chosen.to / f"{chosen.name}.png", dpi=160)


def write_csv(found: Frontier, path: Path) -> None:
    """Every number of every setting."""
    rows = [row(setting, found) for setting in found.settings]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def row(setting: Priced, found: Frontier) -> dict[str, object]:
    """One setting."""
    spans = {"auc": setting.auc, "balanced_accuracy": setting.balanced_accuracy, "auc_lost": setting.lost}
    return {
        "dataset": found.dataset,
        "model": found.model,
        "recipe": found.recipe,
        "defense": setting.defense,
        "family": setting.family,
        "strength": setting.strength,
        "attack": setting.attack,
        "knows_defense": setting.knows,
        "victims": setting.victims,
        **ends(found.column, setting.leakage),
        **{key: value for name, span in spans.items() for key, value in ends(name, span).items()},
        "epsilon": setting.epsilon,
        "bytes_sent": setting.bytes_sent,
        "dominated_by": setting.dominated_by,
        "recommended": setting.defense == found.recommended,
    }


def ends(name: str, span: Span) -> dict[str, object]:
    """A number with its interval as columns."""
    return {
        key: None if value is None else f"{value:.4f}"
        for key, value in ((name, span.value), (f"{name}_low", span.low), (f"{name}_high", span.high))
    }


if __name__ == "__main__":
    main()

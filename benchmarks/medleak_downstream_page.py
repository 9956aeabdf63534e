"""Writes the tables of docs/benchmarks/medleak_downstream.md, and what they show, from the CSVs of
`medleak_downstream.py` and `medleak_cost.py`; all other text of the page stays as it is.

    python benchmarks/medleak_downstream_page.py --out docs/benchmarks
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import medleak_cost
import pandas as pd
from medleak_downstream import ORIGINALS, OWN, TASK, read, table
from medleak_rounds import equivalence, spread
from tables import put

SIGNIFICANT = 0.05


def main() -> None:
    """Reads both tables and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--margin", type=float, default=0.02)
    options = parser.parse_args()
    page, worth = options.out / "medleak_downstream.md", read(options.out / "medleak_downstream.csv")
    put(page, "worth", [line for _, rows in worth.groupby(TASK) for line in _task(rows, options.margin)])
    cost = pd.read_csv(options.out / "medleak_cost.csv")
    put(page, "cost", [f"n = {cost.seed.nunique()} divisions.", "", *medleak_cost.table(cost)])


def _task(rows: pd.DataFrame, margin: float) -> Iterator[str]:
    """One data set with one number of own images."""
    first = rows.iloc[0]
    stolen = int(rows[rows.trained_on == ORIGINALS].images.max())
    nets = f", each measure the mean of {first.nets} nets" if first.nets > 1 else ""
    yield f"### {first.data}: {first.auxiliary} images of the server's own, {stolen} of victims{nets}"
    yield f"\nn = {rows.seed.nunique()} divisions.\n"
    yield from table(rows, margin)
    yield f"\n{' '.join(_shown(rows, margin))}\n"


def _shown(rows: pd.DataFrame, margin: float) -> Iterator[str]:
    """What the rows show, in sentences."""
    yield from (
        _against_own(rows, name, called)
        for name, called in (("balanced_accuracy", "balanced accuracy"), ("auc", "AUC"))
    )
    original = rows[rows.trained_on == ORIGINALS].set_index("seed")
    for name, called in (("balanced_accuracy", "balanced accuracy"), ("auc", "AUC")):
        stolen, equal = 0, []
        for (trained_on, labels), part in rows.groupby(["trained_on", "labels"], sort=False):
            if not str(trained_on).startswith("stolen"):
                continue
            stolen += 1
            differences = (part.set_index("seed")[name] - original[name]).to_numpy()
            if equivalence(differences, margin) < SIGNIFICANT:
                equal.append(f"{trained_on}, {labels}")
        listed = f" ({'; '.join(equal)})" if equal and len(equal) < stolen else ""
        yield f"Equivalence with the originals within {margin} in {called}: {len(equal)} of {stolen} rows of stolen images{listed}."


def _against_own(rows: pd.DataFrame, name: str, called: str) -> str:
    """What images that were read with their labels are worth beside the server's own."""
    own = rows[rows.trained_on == OWN].set_index("seed")[name]
    read_off = rows[(rows.trained_on == "stolen, plain") & (rows.labels == "read")].set_index("seed")[name]
    gain = spread((read_off - own).dropna().to_numpy())
    return (
        f"In {called} images that were stolen in plain with the labels that were read gain {gain.mean:+.3f} "
        f"[{gain.low:+.3f}, {gain.high:+.3f}] on the server's own."
    )


if __name__ == "__main__":
    main()

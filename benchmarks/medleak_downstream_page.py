"""Writes docs/benchmarks/medleak_downstream.md from the CSVs of `medleak_downstream.py` and `medleak_cost.py`.

python benchmarks/medleak_downstream_page.py --out docs/benchmarks
"""

from __future__ import annotations

import argparse
from pathlib import Path

import medleak_cost
import medleak_downstream
import pandas as pd

WORTH = """# What stolen images are worth, and what the attacked round costs

## Classifiers trained on what MedLeak brings

Measured by `python benchmarks/medleak_downstream.py --data {data} --seeds {seeds}`: PneumoniaMNIST (subset), `cnn3`, {rounds} attacked rounds of 64 images, 100 images of the server's own, classes taking turns; 250 Adam steps of 32 images for every row, the same start and order within a seed; judged on the test split, which nobody holds. n = {seeds} divisions; intervals over them. Equivalence: two one-sided paired t tests, margin {margin} for both measures, fixed beforehand. Labels: `read` from the update with the image; `guessed` by the classifier that was trained on the server's own images; `true (oracle)` those of the private image that a candidate resembles most.
"""

COST = """
## What clients could notice

Measured by `python benchmarks/medleak_cost.py --data pneumoniamnist --seeds {seeds}`: eight clients of 64 images, one SGD step a round (learning rate 0.1), mean over all. `noticed`: share of clients whose received loss is above that of every client in the honest round before. The module passes on nothing but brightness, so the received model knows little more than how common the classes are: in the first rounds an honest model knows no more, later it does. n = {seeds}; 95% t intervals.
"""


def main() -> None:
    """Reads both tables and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--margin", type=float, default=0.02)
    options = parser.parse_args()
    worth = pd.read_csv(options.out / "medleak_downstream.csv", keep_default_na=False, na_values=[""])
    rounds = int(worth[worth.trained_on == medleak_downstream.ORIGINALS].images.max()) // 64
    seeds, data = worth.seed.nunique(), worth.data.iloc[0]
    text = WORTH.format(data=data, seeds=seeds, rounds=rounds, margin=options.margin)
    text += "\n" + "\n".join(medleak_downstream.table(worth, options.margin)) + "\n"
    path = options.out / "medleak_cost.csv"
    if path.is_file():
        cost = pd.read_csv(path)
        text += COST.format(seeds=cost.seed.nunique()) + "\n" + "\n".join(medleak_cost.table(cost)) + "\n"
    (options.out / "medleak_downstream.md").write_text(text)


if __name__ == "__main__":
    main()

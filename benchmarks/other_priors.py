"""A prior learnt from the images of another source: what is left of its gain? Otherwise as in `known_noise.py`.

    .venv/bin/python benchmarks/other_priors.py --csv docs/benchmarks/other_priors.csv --table docs/benchmarks/other_priors.md

The same victims, nets, noise and evaluations as in known_noise; only the images change that the attacker learns its prior
from. As many as the victims' own source has are drawn of each source (fewer where it has fewer), without near duplicates
of victims. Rows that the CSV file has already are not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from known_noise import SIDES, Setting, attacked, make_setting, null_rows
from known_noise_page import NULLS
from other_priors_page import OWN, table
from photographs import colored_crops, photograph_crops
from pictures import KINDS, ROOT, load_pictures
from tables import add_texts, has_texts, read_texts
from torch import Tensor

from medpfl.core.domain import Auxiliary
from medpfl.core.seeding import generator
from medpfl.data import MedMnistReader, PhantomReader, load_dataset, near_duplicates_of

SOURCES: dict[str, tuple[str, ...]] = {
    "brain_mri": (OWN, "phantoms", "mednist HeadCT", "mednist BreastMRI", "covid_cxr", "photographs"),
    "covid_cxr": (OWN, "mednist CXR", "pneumoniamnist_subset", "phantoms", "brain_mri", "photographs"),
    "melanoma": (OWN, "isic2017_28", "phantoms", "brain_mri", "photographs"),
}
"""Where attackers of each data set's victims learn; photographs and other organs are controls."""

MEDNIST = ("AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT")
"""Classes of the MedNIST subset, in the order of their labels."""

ALIKE = 0.95
"""Correlation from which an image counts as a victim's near duplicate."""

COLUMNS = (
    "data",
    "scale",
    "source",
    "images",
    "left_out",
    "side",
    "victim",
    "label",
    "psnr",
    "ssim",
    "evaluations",
    "seconds",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the CSV file lacks, then writes the table."""
    options = _options(arguments)
    torch.set_num_threads(1)
    for data in options.data:
        for scale in options.scales:
            own = make_setting(options.root, data, scale, options.victims)
            for source in SOURCES[data]:
                setting, left_out = own, 0
                for side in (*NULLS, *options.sides):
                    key = {"data": data, "scale": scale, "source": source, "side": side}
                    if has_texts(options.csv, key):
                        continue
                    if source != OWN and setting is own:
                        setting, left_out = _learning_from(own, source, data, options.root)
                    key |= {"images": len(_auxiliary(setting).images), "left_out": left_out}
                    rows = null_rows(setting, side) if side in NULLS else _attacked(side, setting, options)
                    found = add_texts(options.csv, COLUMNS, [key | _labeled(one, own) for one in rows])
                    middle = sorted(float(one["psnr"]) for one in found)[len(found) // 2]
                    print(key, round(middle, 2), found[0]["seconds"][:5], flush=True)
    if options.table:
        plain = read_texts(options.csv.with_name("known_noise.csv"))
        options.table.write_text(table(read_texts(options.csv), plain), encoding="utf-8")


def _attacked(side: str, setting: Setting, options: argparse.Namespace) -> list[Mapping[str, Any]]:
    return list(attacked(SIDES[side](options.evaluations), side, setting, options.evaluations))


def _labeled(row: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    return {**row, "label": int(setting.targets[row["victim"]])}


def _auxiliary(setting: Setting) -> Auxiliary:
    found = setting.observations[0].knowledge.auxiliary
    assert found is not None  # every setting grants one
    return found


def _learning_from(own: Setting, source: str, data: str, root: Path) -> tuple[Setting, int]:
    """The setting with the images of another source, with labels in turn, and how many of them resembled victims."""
    images = _images(source, data, root)
    alike = near_duplicates_of(images, own.images, ALIKE)
    kept = images[~alike]
    order = torch.randperm(len(kept), generator=generator("other prior", data, source))
    chosen = kept[order[: len(_auxiliary(own).images)]]
    auxiliary = Auxiliary(chosen, torch.arange(len(chosen)) % (int(own.targets.max()) + 1))
    seen = [replace(one, knowledge=replace(one.knowledge, auxiliary=auxiliary)) for one in own.observations]
    return replace(own, auxiliary=auxiliary, observations=seen), int(alike.sum())


def _images(source: str, data: str, root: Path) -> Tensor:
    kind, channels = KINDS[data]
    if source == "photographs":
        draws = generator("other crops", data)
        return photograph_crops(draws)[0] if channels == 1 else colored_crops(80, draws)
    if source == "phantoms":
        drawn = PhantomReader(kind=kind, count=96, resolution=64)
        return load_dataset(drawn, name=source, size=32, channels=channels).images
    if source in KINDS:
        return load_pictures(root, source, 32, channels)[0].images
    name, _, part = source.partition(" ")
    file = "mednist_64_subset" if name == "mednist" else name
    found = load_dataset(
        MedMnistReader(path=root / "medmnist" / f"{file}.npz"), name=source, size=32, channels=channels
    )
    return found.images[found.targets == MEDNIST.index(part)] if part else found.images


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the data sets (MEDPFL_DATA)")
    parser.add_argument("--data", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument("--scales", nargs="+", type=float, default=[0.01, 0.03], help="of the Laplace noise")
    parser.add_argument("--sides", nargs="*", choices=list(SIDES), default=["covariance"])
    parser.add_argument("--evaluations", type=int, default=300, help="gradient evaluations per victim")
    parser.add_argument("--victims", type=int, default=16)
    parser.add_argument("--csv", type=Path, required=True, help="measured rows, kept and added to")
    parser.add_argument("--table", type=Path, help="Markdown page to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

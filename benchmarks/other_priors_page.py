"""The page of `other_priors.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from known_noise_page import NULLS, SEEN, Row

from medpfl.metrics.statistics import bootstrap_mean, paired_difference

OWN = "own source"

ABOUT = {
    ("brain_mri", "phantoms"): "drawn heads",
    ("brain_mri", "mednist HeadCT"): "the same organ, another modality, other hospitals (TCIA)",
    ("brain_mri", "mednist BreastMRI"): "the same modality, another organ",
    ("brain_mri", "covid_cxr"): "wrong organ: chest X-rays",
    ("covid_cxr", "mednist CXR"): "chest X-rays of another hospital (NIH)",
    ("covid_cxr", "pneumoniamnist_subset"): "chest X-rays at 28 pixels; the hospital of two of the three classes",
    ("covid_cxr", "phantoms"): "drawn chests",
    ("covid_cxr", "brain_mri"): "wrong organ: brain MRI",
    ("melanoma", "isic2017_28"): "other images of the same archive, at 28 pixels",
    ("melanoma", "phantoms"): "drawn lesions",
    ("melanoma", "brain_mri"): "wrong organ: gray brain MRI",
}
"""What is seen on the images of a source."""

ELSEWHERE = {"covid_cxr": ("0", "of the hospital in Hannover")}
"""Labels of victims that no other source can hold: the other two classes of the chest X-rays are from a collection that
`pneumoniamnist_subset` is made of, cropped in another way, so that copies of victims escape the comparison."""

INTRO = """# Priors that were learnt somewhere else

What is left of a learnt prior's gain where the attacker's images come from another source? The victims, nets, noise and
evaluations of [known_noise](known_noise.md) (`lenet_dlg`, 32x32, Laplace noise of scale b on one gradient of one image, 16
victims, 300 evaluations); the attack is maximum a posteriori with a covariance (`likelihood + whole covariance` there),
whose settings were chosen with images of the own source (brain only) and never for any other. Of each source as many
images are drawn as the own source has beside the victims, without near duplicates of victims (correlation above 0.95;
`left out`). No other dermatoscope's images are at hand: `isic2017_28` is of the same archive. `pneumoniamnist_subset` may
hold victims of two of the three classes in another crop, which that comparison does not find; those of the third class,
from another hospital, it cannot hold, so their medians stand below the chest tables.

    .venv/bin/python benchmarks/other_priors.py --csv docs/benchmarks/other_priors.csv \\
        --table docs/benchmarks/other_priors.md

Median PSNR over victims. Gain: mean over victims with 95 % interval (bootstrap over victims), over the better of the two
null baselines (mean of the label's images, nearest image) *of the own source*, whatever was learnt from; `nearest` is the
median of the nearest image of the source itself. `no prior` and `total variation` are the rows of known_noise with the
likelihood alone and with total variation.

What it shows: pictures of the same organ from elsewhere do nearly as well as the victims' own source. Drawn phantoms, which
anybody can make without a single patient, lose 0.5 to 2.0 dB, another hospital's chest X-rays 1.4 to 1.7 dB, another
modality of the head 1.7 to 1.9 dB. Photographs lose 2.4 to 2.8 dB. A wrong organ loses 2.5 to 5.1 dB among gray pictures and
9 to 10 dB where color is missing, where it is worse than no prior that was learnt. So an attacker needs no access to
similar patients, and a defense that is measured against attackers without a prior is measured too kindly. A wrong organ is
still better than the likelihood alone; at b = 0.03 its gain over the null is not surely above zero. (The phantoms were drawn
to look like these kinds of images, none of which they hold.)
"""


def table(rows: Sequence[Row], plain: Sequence[Row] = ()) -> str:
    """Markdown. plain: rows of known_noise, for attackers who learn nothing."""
    lines = [INTRO]
    for data in dict.fromkeys(row["data"] for row in rows):
        for scale in sorted({row["scale"] for row in rows if row["data"] == data}, key=float):
            lines += _part(
                [row for row in rows if (row["data"], row["scale"]) == (data, scale)],
                [
                    row
                    for row in plain
                    if (row["data"], float(row["scale"])) == (data, float(scale))
                    and row["part"] == "test"
                    and not row["settings"]
                ],
                data,
                scale,
            )
    return "\n".join(lines) + "\n"


def _part(rows: Sequence[Row], plain: Sequence[Row], data: str, scale: str) -> list[str]:
    """One data set at one noise."""
    own = {side: _values([row for row in rows if row["source"] == OWN], side) for side in (*NULLS, "covariance")}
    null = max((own[side] for side in NULLS), key=lambda values: float(values.mean()))
    victims = len(own["covariance"])
    seen = (
        f" (victims {', '.join(map(str, SEEN[data]))} were among those that settings were chosen on)"
        if data in SEEN
        else ""
    )
    lines = [f"## {data}, b = {float(scale):g}, {victims} victims{seen}", ""]
    lines += [
        "| learnt from | images (left out) | nearest | median PSNR | gain over null [95 %] | against own source [95 %] |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for side, name in (("likelihood", "nothing: no prior"), ("total_variation", "nothing: total variation")):
        values = _values(plain, side)
        if len(values):
            lines.append(f"| {name} | | | {_scores(values, null, own['covariance'])} |")
    for source in dict.fromkeys(row["source"] for row in rows):
        mine = [row for row in rows if row["source"] == source]
        values, nearest = _values(mine, "covariance"), _values(mine, "nearest")
        about = ABOUT.get((data, source))
        shown = f"{source} ({about})" if about else source
        count = f"{mine[0]['images']} ({mine[0]['left_out']})"
        lines.append(f"| {shown} | {count} | {np.median(nearest):.1f} | {_scores(values, null, own['covariance'])} |")
    if data in SEEN:
        kept = [place for place in range(victims) if place not in SEEN[data]]
        lines += ["", f"Medians without victims {', '.join(map(str, SEEN[data]))}: {_medians(rows, kept)}."]
    if data in ELSEWHERE:
        label, words = ELSEWHERE[data]
        kept = sorted({int(row["victim"]) for row in rows if row["label"] == label})
        lines += ["", f"Medians of the {len(kept)} victims {words} alone: {_medians(rows, kept)}."]
    return [*lines, ""]


def _medians(rows: Sequence[Row], kept: Sequence[int]) -> str:
    """Of these victims alone, for each source."""
    sources = dict.fromkeys(row["source"] for row in rows)
    values = {one: _values([row for row in rows if row["source"] == one], "covariance") for one in sources}
    return "; ".join(f"{one} {np.median(found[list(kept)]):.1f} dB" for one, found in values.items())


def _scores(values: np.ndarray, null: np.ndarray, own: np.ndarray) -> str:
    places = np.arange(len(values))
    gain = bootstrap_mean(values - null, places, seed=0)
    lost = paired_difference(values, own, places, seed=0)
    apart = (
        "" if values is own or np.array_equal(values, own) else f"{lost.mean:+.1f} [{lost.low:+.1f}, {lost.high:+.1f}]"
    )
    return f"{np.median(values):.1f} dB | {gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}] | {apart}"


def _values(rows: Sequence[Row], side: str) -> np.ndarray:
    found = [row for row in rows if row["side"] == side]
    return np.array([float(row["psnr"]) for row in sorted(found, key=lambda row: int(row["victim"]))])

"""What knowing the noise, and what images look like, is worth to an attacker: LeNet of DLG, 32x32, Laplace noise.

    .venv/bin/python benchmarks/known_noise.py --data brain_mri --scales 0.01 --csv docs/benchmarks/known_noise.csv

Every victim has a net of its own (uniform(-0.5, 0.5)) and sends one gradient of one image with Laplace noise of scale b
on every entry. All sides infer the label, see the same victims, nets and noise, and spend at most `--evaluations`
gradient evaluations, rehearsals included. Priors are learnt from the images that are no victims. `photographs` are grey
crops of scikit-image's bundled photographs, victims and auxiliary crops from different ones. `--development` attacks
other victims: settings were chosen on them. Rows that the CSV file has already are not measured again; `--table` and
`--figure` write the page.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from known_noise_page import NULLS, figure, table
from photographs import photograph_crops
from pictures import KINDS, ROOT, load_pictures
from tables import add_texts, has_texts, read_texts
from torch import Tensor

from medpfl.attacks.base import Attack
from medpfl.attacks.gradinv import GradInv
from medpfl.attacks.maximum_a_posteriori import MaximumAPosteriori
from medpfl.core.domain import Auxiliary, Batch, GlobalModel, Knowledge, Observation, Recipe, Reconstruction
from medpfl.core.functional import psnr, ssim
from medpfl.core.mechanisms import LaplaceNoise
from medpfl.core.seeding import generator
from medpfl.core.tasks import SingleLabel
from medpfl.defenses.laplace import Laplace
from medpfl.federation.client import client_step
from medpfl.federation.hooks import NO_HOOKS
from medpfl.metrics.nulls import null_baselines
from medpfl.metrics.truth import GroundTruth
from medpfl.models import MODELS, prepare

DEVELOPMENT = 12
"""Victims that settings were chosen on; auxiliary images for everybody else."""

COLUMNS = ("data", "part", "scale", "side", "settings", "budget", "victim", "psnr", "ssim", "evaluations", "seconds")


def _published(budget: int) -> Attack:
    return GradInv(
        distance="l2", total_variation=0.0, iterations=budget - 1, signed=False, learning_rate=0.05, patience=0
    )


def _with_prior(prior: Any, iterations: Callable[[int], int]) -> Callable[[int], Attack]:
    return lambda budget: MaximumAPosteriori(prior=prior, iterations=iterations(budget))


SIDES: dict[str, Callable[[int], Attack]] = {
    "published": _published,
    "likelihood": _with_prior("none", lambda budget: budget - 1),
    "total_variation": _with_prior("total_variation", lambda budget: budget - 1),
    "principal_components": _with_prior("principal_components", lambda budget: int(budget / 1.25) - 1),
    "covariance": _with_prior("covariance", lambda budget: int(budget / 1.25) - 1),
    "denoiser": _with_prior("denoiser", lambda budget: int(budget / 2.85)),
}
"""What attacks, for a budget of evaluations: squared differences without a prior, then with the likelihood of the noise."""


@dataclass(frozen=True)
class Setting:
    """Victims with what they send, and the images that the attacker owns."""

    images: Tensor
    targets: Tensor
    auxiliary: Auxiliary
    observations: list[Observation]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the CSV file lacks, then writes what was asked for."""
    options = _options(arguments)
    torch.set_num_threads(1)
    part = "development" if options.development else "test"
    for data in options.data:
        for scale in options.scales:
            setting = None
            for side in (*NULLS, *options.sides):
                key = {"data": data, "part": part, "scale": scale, "side": side, "settings": " ".join(options.set)}
                key |= {"budget": 0 if side in NULLS else options.evaluations}
                if has_texts(options.csv, key):
                    continue
                setting = setting or make_setting(options.root, data, scale, options.victims, options.development)
                found = [key | one for one in _measured(side, setting, options)]
                add_texts(options.csv, COLUMNS, found)
                middle = sorted(one["psnr"] for one in found)[len(found) // 2]
                print({**key, "psnr": round(middle, 2), "seconds": round(found[0]["seconds"], 2)}, flush=True)
    if options.table:
        options.table.write_text(table(read_texts(options.csv)), encoding="utf-8")
    if options.figure:
        bought = options.csv.with_name("noise_bought.csv")
        searched = [row for row in read_texts(bought) if row["part"] == "test"] if bought.is_file() else []
        figure(read_texts(options.csv), options.figure, searched)


def make_setting(root: Path, data: str, scale: float, count: int, development: bool = False) -> Setting:
    """The same images, nets and labels for all scales; noise by victim and scale (none at 0)."""
    images, targets, order = _pictures(root, data)
    first = count if development else 0
    victims = order[first : first + (DEVELOPMENT if development else count)]
    others = order[count:] if not development else order[count + DEVELOPMENT :]
    auxiliary = Auxiliary(images[others], targets[others])
    knows = Knowledge(defense=LaplaceNoise(scale) if scale else None, auxiliary=auxiliary)
    observations = []
    for index in victims:
        model = _net(tuple(images.shape[1:]), int(targets.max()) + 1, data, index)
        batch, noise = Batch(images[[index]], targets[[index]]), generator("known noise", data, index, scale)
        hooks = Laplace(scale=scale) if scale else NO_HOOKS
        update, _ = client_step(model, batch, Recipe(), hooks=hooks, generator=noise)
        observations.append(Observation(model, update, Recipe(), "eavesdropper", knows))
    return Setting(images[victims], targets[victims], auxiliary, observations)


def _pictures(root: Path, data: str) -> tuple[Tensor, Tensor, list[int]]:
    """Images, targets and the order in which they become victims; crops come with their victims in front."""
    if data == "photographs":
        images, targets = photograph_crops(generator("crops"))
        return images, targets, list(range(len(images)))
    dataset, _ = load_pictures(root, data, 32)
    order = torch.randperm(len(dataset.images), generator=generator("known noise", data)).tolist()
    return dataset.images, dataset.targets, order


def _net(shape: tuple[int, ...], classes: int, data: str, index: int) -> GlobalModel:
    net = MODELS["lenet_dlg"].item(shape, classes, generator("net", data, index)).eval()
    model = prepare(net, name="lenet_dlg", image_shape=shape, task=SingleLabel(classes))
    return replace(model, parameters={name: tensor.detach() for name, tensor in model.parameters.items()})


def _measured(side: str, setting: Setting, options: argparse.Namespace) -> Iterator[Mapping[str, Any]]:
    if side in NULLS:
        yield from null_rows(setting, side)
        return
    attack = replace(SIDES[side](options.evaluations), **dict(_value(one) for one in options.set))  # type: ignore[type-var]
    yield from attacked(attack, side, setting, options.evaluations)


def null_rows(setting: Setting, side: str) -> Iterator[Mapping[str, Any]]:
    """What a baseline that owes nothing to the update gets of each victim."""
    truth = GroundTruth(setting.images, setting.targets, ("",) * len(setting.images))
    null = null_baselines(truth, setting.auxiliary.images, setting.auxiliary.targets, generator("noise"))[side]
    for place in range(len(setting.images)):
        scores = {"psnr": float(null.psnr[place]), "ssim": float(null.ssim[place])}
        yield {"victim": place, **scores, "evaluations": 0, "seconds": 0.0}


def attacked(attack: Attack, side: str, setting: Setting, budget: int) -> Iterator[Mapping[str, Any]]:
    """What an attack gets of each victim, and that it kept to its budget. side: names the attack's random numbers."""
    start = time.process_time()
    results = attack.reconstruct(
        setting.observations, [generator("attack", side, k) for k in range(len(setting.images))]
    )
    seconds = (time.process_time() - start) / len(results)
    for place, (result, truth) in enumerate(zip(results, setting.images, strict=True)):
        assert isinstance(result, Reconstruction)
        assert result.gradient_evaluations <= budget
        scores = {"psnr": float(psnr(result.images, truth[None])), "ssim": float(ssim(result.images, truth[None]))}
        yield {"victim": place, **scores, "evaluations": result.gradient_evaluations, "seconds": seconds}


def _value(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, float(value) if "." in value or "e" in value else int(value)
    except ValueError:
        return name, value


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the data sets (MEDPFL_DATA)")
    parser.add_argument("--data", nargs="+", choices=[*KINDS, "photographs"], default=list(KINDS))
    parser.add_argument("--scales", nargs="+", type=float, default=[0.003, 0.01, 0.03], help="of the Laplace noise")
    parser.add_argument("--sides", nargs="*", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--evaluations", type=int, default=300, help="gradient evaluations of each side and victim")
    parser.add_argument("--victims", type=int, default=16)
    parser.add_argument("--development", action="store_true", help="other victims, to choose settings on")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the attacks measured")
    parser.add_argument("--csv", type=Path, required=True, help="measured rows, kept and added to")
    parser.add_argument("--table", type=Path, help="Markdown page to write")
    parser.add_argument("--figure", type=Path, help="PNG to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

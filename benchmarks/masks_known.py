"""What masks hide: the same victims attacked with their true masks and with masks that are searched.

    python benchmarks/masks_known.py --kinds chest --victims 8 --iterations 500

A U-Net is trained with the masks of phantoms (drawn images whose masks are known exactly); each victim sends the plain
gradient of one image. Both rows of a pair meet the same net, victims and starts, and spend the same number of gradient
evaluations. The last column is the paired difference of PSNR (given minus joint) with its 95% interval over victims.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import yaml
from torch import Tensor

from medpfl.attacks import ATTACKS
from medpfl.core.domain import Batch, GlobalModel, Knowledge, Observation, Recipe, Reconstruction
from medpfl.core.functional import psnr, ssim
from medpfl.core.seeding import generator
from medpfl.core.tasks import Segmentation
from medpfl.data import Dataset, PhantomReader, load_dataset
from medpfl.federation.client import client_step
from medpfl.federation.training import TrainingConfig, train
from medpfl.metrics.masks import mask_dice
from medpfl.metrics.statistics import bootstrap_mean
from medpfl.models import SEGMENTATION, build_model

Kind = Literal["brain", "chest", "skin"]

HEADER = "| data | net | steps trained | masks | PSNR [95 %] | SSIM | mask Dice | objective | evaluations | process s | difference |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, row by row as it is measured."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    settings = dict(yaml.safe_load(f"{{{one.replace('=', ': ', 1)}}}").popitem() for one in options.set)
    settings = {"iterations": options.iterations, **settings}
    print(f"{options.attack} {settings}, {options.victims} victims, seed {options.seed}, size {options.size}\n")
    print(HEADER)
    print("|" + " --- |" * (HEADER.count("|") - 1), flush=True)
    for kind in options.kinds:
        channels: Any = 3 if kind == "skin" else 1
        reader = PhantomReader(kind=kind, count=options.victims + 64, resolution=2 * options.size, seed=options.seed)
        dataset = load_dataset(reader, name=kind, size=options.size, channels=channels)
        for steps in options.steps:
            model = _model(dataset, options.model, options.victims, steps, options.seed)
            pair: dict[str, Tensor] = {}
            for masks in options.masks:
                started = time.process_time()
                rows = _attacked(model, dataset, options.attack, {**settings, "masks": masks}, options)
                seconds = (time.process_time() - started) / options.victims
                pair[masks] = rows[:, 0]
                print(f"| {kind} | {options.model} | {steps} | {masks} | {_row(rows, seconds, pair)} |", flush=True)


def _model(dataset: Dataset, name: str, victims: int, steps: int, seed: int) -> GlobalModel:
    """A net with random weights, or trained on the images that are no victims."""
    assert dataset.masks is not None
    model = build_model(
        name,
        image_shape=tuple(dataset.images.shape[1:]),
        task=Segmentation(len(dataset.mask_names)),
        generator=generator("net", seed, name),
    )
    if not steps:
        return model
    config = TrainingConfig(steps=steps, batch_size=8)
    return train(model, dataset.images[victims:], dataset.masks[victims:], config, generator("training", seed))[0]


def _attacked(
    model: GlobalModel, dataset: Dataset, name: str, settings: dict[str, Any], options: argparse.Namespace
) -> Tensor:
    """PSNR, SSIM, Dice (NaN without a mask), objective and evaluations per victim (V, 5)."""
    assert dataset.masks is not None
    attack = ATTACKS[name].item(**settings)
    recipe, observations = Recipe(), []
    for index in range(options.victims):
        masks = dataset.masks[[index]]
        update, _ = client_step(model, Batch(dataset.images[[index]], masks), recipe)
        observations.append(Observation(model, update, recipe, "honest_server", Knowledge(masks=masks)))
    streams = [generator("attack", options.seed, index) for index in range(options.victims)]
    rows = []
    for index, result in enumerate(attack.reconstruct(observations, streams)):
        assert isinstance(result, Reconstruction), result
        true, found = dataset.images[[index]], result.images.float()
        dice = float("nan") if result.masks is None else float(mask_dice(result.masks, dataset.masks[[index]]))
        scores = [float(psnr(true, found)), float(ssim(true, found)), dice]
        rows.append([*scores, result.objective, float(result.gradient_evaluations)])
    return torch.tensor(rows, dtype=torch.float64)


def _row(rows: Tensor, seconds: float, pair: dict[str, Tensor]) -> str:
    means = rows.mean(dim=0).tolist()
    difference = _interval(pair["given"] - pair["joint"]) if len(pair) == 2 else ""
    dice = "" if means[2] != means[2] else f"{means[2]:.2f}"
    return (
        f"{_interval(rows[:, 0])} | {means[1]:.3f} | {dice} | {means[3]:.2e} | {means[4]:.0f} | {seconds:.1f} | "
        f"{difference}"
    )


def _interval(values: Tensor) -> str:
    found = bootstrap_mean(values.numpy(), range(len(values)), seed=0)
    if found.low is None or found.high is None:
        return f"{values.mean():.1f}"
    return f"{found.mean:.1f} [{found.low:.1f}, {found.high:.1f}]"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", default=["chest", "skin"], choices=get_args(Kind))
    parser.add_argument("--model", default="unet_small", choices=sorted(SEGMENTATION))
    parser.add_argument("--attack", default="gradinv", choices=["dlg", "gradinv", "gradinversion"])
    parser.add_argument("--masks", nargs="+", default=["given", "joint"], choices=["given", "joint"])
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 40], help="training steps before the attack")
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--victims", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="of net, images and starts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="attack settings")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

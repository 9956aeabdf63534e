"""What an image scores that uses no update at all. Medical images are so alike that an unrelated one scores high."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.core.functional import mse, psnr, ssim
from medpfl.metrics.scoring import pairwise_mse
from medpfl.metrics.truth import GroundTruth

NULLS = ("class_mean", "nearest", "noise")
"""The names of the null baselines, as in the columns of `cells.csv`."""

CHUNK_ENTRIES = 2**23
"""Most image entries that are held in double precision at once."""


@dataclass(frozen=True)
class NullScores:
    """Scores of one null baseline per private image: psnr (dB), ssim and mse, each (N,) float64; images (N, C, *S)."""

    psnr: Tensor
    ssim: Tensor
    mse: Tensor
    images: Tensor


def null_baselines(
    truth: GroundTruth, null_images: Tensor, null_targets: Tensor, generator: torch.Generator
) -> dict[str, NullScores]:
    """Scores the null baselines on every private image.

    `null_images` (M, C, *spatial) in [0, 1] and `null_targets` (M,) or (M, classes) are the pool's null part; `truth`
    may hold the images of many victims at once.

    - `class_mean`: the mean of the null part's images with the private image's label, of all of them if there is none.
    - `nearest`: the image of the null part with the lowest MSE. It is chosen with the truth in hand, so it is an upper
      bound in MSE on every adversary who ignores the update and hands back an image of the null part.
    - `noise`: uniform in [0, 1], drawn from `generator`.

    An empty null part leaves only `noise`. Memory stays at a few chunks, however many null images there are.
    """
    nulls: dict[str, NullScores] = {}
    if len(null_images):
        nulls["class_mean"] = _scores(truth.images, _class_means(truth, null_images, null_targets))
        nulls["nearest"] = _scores(truth.images, null_images[_nearest(truth.images, null_images)])
    noise = torch.rand(truth.images.shape, generator=generator)
    nulls["noise"] = _scores(truth.images, noise)
    return nulls


def _scores(truth: Tensor, images: Tensor) -> NullScores:
    images = images.to(truth.device, torch.float32)
    pairs = [(truth[part], images[part]) for part in _chunks(truth)]
    return NullScores(
        psnr=torch.cat([psnr(a, b) for a, b in pairs]),
        ssim=torch.cat([ssim(a, b) for a, b in pairs]),
        mse=torch.cat([mse(a, b) for a, b in pairs]),
        images=images,
    )


def _class_means(truth: GroundTruth, null_images: Tensor, null_targets: Tensor) -> Tensor:
    """For every private image the mean null image of its label (label vector, for multi-label data)."""
    labels, which = torch.unique(truth.labels, dim=0, return_inverse=True)
    same = labels[:, None].to(null_targets.dtype) == null_targets[None, :].to(labels.device)
    members = same.flatten(2).all(2) if same.ndim > 2 else same
    members = torch.where(members.any(1, keepdim=True), members, True).double()
    sums = torch.zeros(len(labels), null_images[0].numel(), dtype=torch.float64)
    for part in _chunks(null_images):
        sums += members[:, part] @ null_images[part].double().flatten(1)
    means = sums / members.sum(1, keepdim=True)
    return means.reshape(len(labels), *null_images.shape[1:])[which]


def _nearest(truth: Tensor, null_images: Tensor) -> Tensor:
    """For every private image the index of the null image with the lowest MSE."""
    best = torch.full((len(truth),), torch.inf, dtype=torch.float64)
    index = torch.zeros(len(truth), dtype=torch.int64)
    for rows in _chunks(truth):
        for columns in _chunks(null_images):
            distance, where = pairwise_mse(truth[rows], null_images[columns]).min(1)
            better = distance < best[rows]
            best[rows] = torch.where(better, distance, best[rows])
            index[rows] = torch.where(better, where + columns.start, index[rows])
    return index


def _chunks(images: Tensor) -> Iterator[slice]:
    """Slices of a stack of images with at most `CHUNK_ENTRIES` entries, at least one image, each."""
    step = max(1, CHUNK_ENTRIES // max(1, images[0].numel()))
    for start in range(0, len(images), step):
        yield slice(start, min(start + step, len(images)))

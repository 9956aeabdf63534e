"""How simulated rounds with a leakage module went, whose images the attacker knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from medpfl.attacks.calibration import Search, Trial, judged, rounding_floor, sought, together
from medpfl.attacks.crafted import ServerView
from medpfl.attacks.module_readout import read_singles
from medpfl.attacks.module_update import Mode, images_of, module_gradients, most_images, sent_bins
from medpfl.attacks.updates import one_gradient
from medpfl.core.domain import Batch, Broadcast, Observation

PEELED = 25.0
"""By how many dB images must be clearer to be peeled: what one of them leaves behind disturbs those that come after."""


def leaking(view: ServerView, mode: Mode) -> int:
    """How many clients get the module."""
    return 1 if mode == "separate" else view.clients


def tried(batches: Sequence[Batch], observation: Observation, *, mode: Mode) -> Trial:
    """How well images alone in a bin came back, without peeling; after several local steps all images."""
    assert observation.broadcast is not None  # `simulated` sees to that
    bins, shape = sent_bins(observation.broadcast), observation.model.image_shape
    several, trials = not one_gradient(observation.recipe), []
    held = [batch.images for batch in batches]
    for gradient, images in zip(
        module_gradients(observation, mode), held if mode == "apart" else [torch.cat(held)], strict=True
    ):
        floor = 0.0 if several else rounding_floor(bins.per_bin(gradient.bias), bins.counts(images))
        found = read_singles(gradient, bins, shape, most_images(observation, mode), floor)
        trials.append(judged(images if several else images[bins.alone(images)], found.images, floor))
    trial = together(trials)
    return trial if len(bins.rows) == 1 else replace(trial, psnr=trial.psnr - PEELED)


def played(sent: Broadcast, view: ServerView, mode: Mode, generator: torch.Generator) -> float:
    """The share of all images that come back in simulated rounds with this broadcast."""

    def read(batches: Sequence[Batch], observation: Observation) -> Trial:
        found = torch.cat([one.images for one in images_of(observation, module_gradients(observation, mode), mode)])
        return judged(torch.cat([batch.images for batch in batches]), found, 0.0)

    _, trial = sought(view, Search((sent,)), lambda one: one, read, leaking=leaking(view, mode), generator=generator)
    return trial.share

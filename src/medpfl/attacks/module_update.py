"""Reads the update of a round in which a leakage module was sent: images, whose they are, and their labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from medpfl.attacks.bin_labels import read_labels
from medpfl.attacks.bin_readout import Candidates, read_out, side_by_side
from medpfl.attacks.module_readout import ModuleGradient, read_module
from medpfl.attacks.query_bins import QueryBins
from medpfl.attacks.updates import batch_norm_mode
from medpfl.core.domain import Broadcast, Failure, Observation, Reconstruction

Mode = Literal["separate", "joint", "apart"]


def read_update(observation: Observation, mode: Mode) -> Reconstruction | Failure:
    """Images, best first, then what their labels are."""
    if observation.broadcast is None or "alike" not in observation.broadcast.secret:
        return Failure("medleak reads the update of a model that it prepared, and this server sent another")
    gradients = module_gradients(observation, mode)
    found = images_of(observation, gradients, mode)
    bins, labels = sent_bins(observation.broadcast), []
    for one, gradient in zip(found, gradients, strict=True):
        settings = bins, observation.examples, batch_norm_mode(observation.recipe)
        labels.append(read_labels(observation.model, one, gradient.bias, *settings))
    known = [one for one in labels if one is not None]
    result = read_out(observation, side_by_side(found), gradients[0].notes, torch.cat(known) if known else None)
    if mode == "joint" or observation.clients == 1:
        return result
    whose = [torch.full((len(one.images),), client) for client, one in enumerate(found)]
    return replace(result, clients=torch.cat(whose))


def module_gradients(observation: Observation, mode: Mode) -> list[ModuleGradient]:
    """What the update shows of the module's own gradient: of all its units, or of each client's."""
    assert observation.broadcast is not None  # the callers see to that
    sent, bins = observation.broadcast.secret, sent_bins(observation.broadcast)
    gradient = ModuleGradient(
        observation,
        alone=mode != "joint",
        first_only="first_batch" in sent,
        within=bins if "all_batches" in sent else None,
        alike=bool(sent["alike"]),
    )
    if mode != "apart":
        return [gradient]
    return [replace(gradient, block=(one * bins.units, bins.units)) for one in range(observation.clients)]


def images_of(observation: Observation, gradients: list[ModuleGradient], mode: Mode) -> list[Candidates]:
    """What each of `module_gradients` shows, whoever's images it is of."""
    assert observation.broadcast is not None  # the callers see to that
    bins, floor = sent_bins(observation.broadcast), float(observation.broadcast.secret["floor"])
    shape, most = observation.model.image_shape, most_images(observation, mode)
    return [read_module(gradient, bins, shape, most, floor) for gradient in gradients]


def most_images(observation: Observation, mode: Mode) -> int:
    """How many images can be in what a gradient shows."""
    return observation.examples // (observation.clients if mode != "joint" else 1)


def sent_bins(broadcast: Broadcast) -> QueryBins:
    """The bins of the module that was sent: of each client's units where these are apart."""
    return QueryBins(broadcast.secret["rows"], broadcast.secret["edges"])

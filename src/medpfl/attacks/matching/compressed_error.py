"""What a compressed update still says about the model's output error: nearly everything, because the last bias is small.

The entries of the error of one image sum to zero (softmax), only the label's is negative, and each is known to within
what the compression of the last bias leaves open.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from medpfl.attacks.layers import DenseLayer, last_dense
from medpfl.attacks.matching.likelihoods import Likelihood, NotCombined, View, likelihood
from medpfl.attacks.matching.likelihoods.intervals import interval_distance
from medpfl.attacks.matching.likelihoods.low_rank import measured_distance
from medpfl.attacks.matching.output_error import ends_there
from medpfl.attacks.updates import gradient_view
from medpfl.core.devices import CPU, moved
from medpfl.core.domain import Observation
from medpfl.core.mechanisms import ErrorFeedback, Mechanism, Signs

UNKNOWN = 1e6
"""Half width of the interval of an entry of which nothing is known, in units of the largest known one."""


def compressed_error(observation: Observation, mechanism: Mechanism) -> Tensor | None:
    """The likeliest derivative of the loss by the outputs (classes,), float64; None where compression hides it.

    Entries whose intervals are wider take more of what is missing to the sum of zero.
    """
    observation = moved(observation, CPU)
    model, layer = observation.model, last_dense(observation.model)
    if observation.examples != 1 or model.task.name != "single_label":
        return None
    if not isinstance(layer, DenseLayer) or layer.bias is None or not ends_there(model, layer.bias):
        return None
    shown = gradient_view(observation)
    if not shown.exact:
        return None
    rounds = [gradient_view(replace(observation, update=one)).tensors for one in observation.earlier]
    rounds.append(shown.tensors)
    part = mechanism.part if isinstance(mechanism, ErrorFeedback) else mechanism
    if isinstance(part, Signs):
        return _from_signs(rounds[0][layer.bias]) if part.scaled else None  # feedback changes later rounds
    names = tuple(shown.tensors)
    stacked = [tuple(tensors[name][None] for name in names) for tensors in rounds]
    view = View(names, stacked[-1], model, observation.recipe, earlier=tuple(stacked[:-1]))
    try:
        known = likelihood(mechanism, view)
    except NotCombined:
        return None
    return _from_evidence(known, names.index(layer.bias))


def _from_evidence(known: Likelihood, place: int) -> Tensor | None:
    """The middle of the last bias' intervals, moved within them so that it sums to zero."""
    if known.evidence is None or known.distance not in (interval_distance, measured_distance):
        return None
    evidence = known.evidence[place][0]
    if known.distance is measured_distance:
        return evidence if evidence.ndim == 1 and bool(evidence.any()) else None
    lowest, highest = evidence
    limit = UNKNOWN * torch.where(evidence.isfinite(), evidence.abs(), 0.0).amax()
    lowest, highest = lowest.clamp_min(-limit), highest.clamp_max(limit)
    middle: Tensor
    middle, width = (lowest + highest) / 2, (highest - lowest) / 2
    if not bool(middle.any()):
        return None
    if bool(width.any()):
        middle = middle - width * (middle.sum() / width.sum())
    return middle


def _from_signs(message: Tensor) -> Tensor | None:
    """The negative entry is minus the sum of all others, so half the sum of all magnitudes; the others are alike."""
    negative = message < 0
    if int(negative.sum()) != 1 or not bool((message > 0).any()):
        return None
    half = message.abs().sum() / 2
    return torch.where(negative, -half, torch.where(message > 0, half / (message > 0).sum(), 0.0))

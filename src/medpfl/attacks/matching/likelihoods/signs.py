"""Signs: how sure a candidate's gradient is of the signs that were sent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from medpfl.attacks.matching.likelihoods.base import Likelihood, View, likelihood_of
from medpfl.attacks.matching.likelihoods.rounds import compressed
from medpfl.core.mechanisms import Signs

TEMPERATURE = 0.3
"""Magnitudes, in units of their tensor's mean, at which a sign begins to be sure."""

DEVIATION = 0.2
"""Share of the root mean square by which values may be off: a wrong sign then costs a few nats, as in a logistic
regression, and not the hundreds that would let fourteen thousand signs outvote any prior."""

TINY = 1e-30


@likelihood_of(Signs)
def signs(mechanism: Signs, view: View) -> Likelihood:
    """Sum over entries of (T log(1 + exp(-sign * value / T)))^2: a logistic penalty of wrong signs in squared units of
    gradients, so that searches for squared differences know its scale; and, where a scale was sent, the number of
    entries times the squared difference of the mean magnitude from it.

    T is a share of the tensor's mean magnitude: of the one that was sent, else of the candidate's own.
    """
    rounds = list(compressed(view))
    times = [one.times for one in rounds]
    evidence = tuple(
        torch.stack([torch.stack([one.before[place], one.message[place]], dim=1) for one in rounds], dim=1)
        for place in range(len(view.names))
    )

    def distance(gradients: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor) -> Tensor:
        terms = []
        for gradient, target in zip(gradients, targets, strict=True):
            parts = []
            for count, (before, message) in zip(times, target, strict=True):
                value, sent = count * gradient - before, message.abs().amax()
                own = value.abs().mean()
                warmth = TEMPERATURE * (sent if mechanism.scaled else own.detach()) + TINY
                wrong = (warmth * softplus(-message.sign() * value / warmth)).square().sum()
                length = gradient.numel() * (own - sent).square() if mechanism.scaled else 0.0
                parts.append((wrong + length) / count**2)
            terms.append(torch.stack(parts).sum())
        return (torch.stack(terms) * weights).sum()

    return Likelihood(distance, evidence=evidence, deviation=DEVIATION)

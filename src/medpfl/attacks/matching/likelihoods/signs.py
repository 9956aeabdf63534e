"""Signs: how sure a candidate's gradient is of the signs that were sent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from medpfl.attacks.matching.likelihoods.base import Likelihood, View, even, likelihood_of
from medpfl.attacks.matching.likelihoods.rounds import compressed
from medpfl.core.mechanisms import Signs

TEMPERATURE = 0.1
"""Magnitudes, in units of their tensor's mean, at which a sign begins to be sure."""

TINY = 1e-30


@likelihood_of(Signs)
def signs(mechanism: Signs, view: View) -> Likelihood:
    """Sum over entries of log(1 + exp(-sign * value / temperature)), and, where a scale was sent, how far the mean
    magnitude is from it.

    The temperature is a share of the tensor's mean magnitude: of the one that was sent, else of the candidate's own.
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
                scale = sent if mechanism.scaled else own.detach()
                sure = softplus(-message.sign() * value / (TEMPERATURE * scale + TINY)).sum()
                if mechanism.scaled:
                    sure = sure + gradient.numel() * (own / (sent + TINY) - 1.0).square()
                parts.append(sure)
            terms.append(torch.stack(parts).sum())
        return (torch.stack(terms) * weights).sum()

    entries = sum(target[0].numel() for target in view.targets)
    return Likelihood(distance, weights=even(view, 1.0 / entries), evidence=evidence)

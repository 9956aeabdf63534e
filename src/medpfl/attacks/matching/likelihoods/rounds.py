"""What a client compressed in each round in which it answered with the same images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medpfl.attacks.matching.likelihoods.base import Likelihood, View, likelihood, likelihood_of
from medpfl.core.mechanisms import ErrorFeedback


@dataclass(frozen=True)
class Compressed:
    """One round: `message` was made of `times` * gradient - `before`, tensor by tensor, (V, *shape) each."""

    times: int
    before: tuple[Tensor, ...]
    message: tuple[Tensor, ...]


def compressed(view: View) -> Iterator[Compressed]:
    """All observed rounds, the first one first.

    With error feedback round t compresses the update and what was left out before: t * gradient - sum of the messages
    before it. Without, every round compresses the gradient.
    """
    before = tuple(torch.zeros_like(target) for target in view.targets)
    for number, message in enumerate((*view.earlier, view.targets), start=1):
        yield Compressed(number if view.feedback else 1, before, message)
        if view.feedback:
            before = tuple(total + one for total, one in zip(before, message, strict=True))


@likelihood_of(ErrorFeedback)
def error_feedback(mechanism: ErrorFeedback, view: View) -> Likelihood:
    """That of the part, told that rounds give back what earlier ones left out."""
    return likelihood(mechanism.part, replace(view, feedback=True))

"""From what a defense does to what an adversary who knows it minimizes; one file per family of mechanisms."""

from medpfl.attacks.matching.likelihoods import (
    clipping,
    composed,
    intervals,
    low_rank,
    noise,
    orthogonal,
    representation,
    rounds,
    signs,
    three_values,
)
from medpfl.attacks.matching.likelihoods.base import (
    Likelihood,
    NotCombined,
    View,
    defended,
    even,
    has_likelihood,
    likelihood,
    likelihood_of,
    why_no_likelihood,
)

__all__ = [
    "Likelihood",
    "NotCombined",
    "View",
    "clipping",
    "composed",
    "defended",
    "even",
    "has_likelihood",
    "intervals",
    "likelihood",
    "likelihood_of",
    "low_rank",
    "noise",
    "orthogonal",
    "representation",
    "rounds",
    "signs",
    "three_values",
    "why_no_likelihood",
]

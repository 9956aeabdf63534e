"""Does a claimed epsilon follow from what the filter does?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from medpfl.audit.filters.noise import Noise
from medpfl.audit.filters.sensitivity import Sensitivity
from medpfl.core.guarantees import Guarantee, Release
from medpfl.metrics.privacy import state

TOLERANCE = 0.01
"""How much larger than claimed an epsilon may come out, because noise is measured."""


@dataclass(frozen=True)
class Claim:
    """(epsilon, delta) that a filter is said to give over so many rounds. Without an epsilon nothing is claimed."""

    epsilon: float | None = None
    delta: float = 1e-5
    rounds: int = 1

    @property
    def classical(self) -> float | None:
        """Noise multiplier that the classical formula gives for this claim in one round; proved up to epsilon 1 only."""
        return None if self.epsilon is None else math.sqrt(2 * math.log(1.25 / self.delta)) / self.epsilon


@dataclass(frozen=True)
class Following:
    """What follows from the measured noise and sensitivity, for all that a client sends.

    reasons: why no epsilon follows; else empty. multiplier: standard deviation (or Laplace scale) over sensitivity.
    once, composed: epsilon of one round and over the claim's rounds, where an update put to zero must look alike;
    replaced: over the rounds, where any other update must look alike.
    """

    reasons: tuple[str, ...] = ()
    multiplier: float | None = None
    once: float | None = None
    composed: float | None = None
    replaced: float | None = None


def following(claim: Claim, noise: Noise, sensitivity: Sensitivity) -> Following:
    """The epsilons, or why there is none. Raises MissingExtra for Laplace noise over rounds without dp-accounting."""
    reasons = tuple(_reasons(noise, sensitivity))
    if reasons:
        return Following(reasons)
    laplace = noise.kind == "laplace"
    distance = sensitivity.absolute_distance if laplace else sensitivity.distance
    if distance == 0:
        return Following(("nothing that is sent depends on the update",))
    release = Release("laplace" if laplace else "gaussian", 1 / distance)
    half = Release(release.kind, release.scale / 2)
    removed = Guarantee("client", "zero_out", (release,))
    return Following(
        multiplier=release.scale,
        once=state(removed, rounds=1, delta=claim.delta).epsilon,
        composed=state(removed, rounds=claim.rounds, delta=claim.delta).epsilon,
        replaced=state(Guarantee("client", "replace", (half,)), rounds=claim.rounds, delta=claim.delta).epsilon,
    )


def _reasons(noise: Noise, sensitivity: Sensitivity) -> list[str]:
    if noise.error or sensitivity.error:
        return [f"the filter could not be measured: {noise.error or sensitivity.error}"]
    reasons = []
    if not noise.present:
        reasons.append("it adds no noise, and without noise no epsilon is finite")
    elif noise.noised < 1:
        reasons.append(f"{1 - noise.noised:.0%} of the trainable entries have no noise")
    if noise.follows_update:
        reasons.append(
            "its noise grows and shrinks with the update, so the noise itself gives the update's size away and is not "
            "calibrated to a bound"
        )
    if noise.follows_counter:
        reasons.append("its noise depends on batch norm's counter of batches, which has nothing to do with privacy")
    if noise.frozen:
        reasons.append("its noise is the same after every start, so whoever knows the program takes it off")
    if not sensitivity.bounded and not noise.follows_update and not noise.follows_counter:
        reasons.append(
            f"nothing bounds what one update changes: a thousand times larger one moved what is sent "
            f"{sensitivity.growth:.4g} times as far"
        )
    if noise.present and noise.kind == "other":
        reasons.append("its noise is neither normal nor Laplace")
    return reasons

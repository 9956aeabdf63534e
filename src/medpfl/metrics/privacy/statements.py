"""What a guarantee says over a federation's rounds: epsilon, delta and the reconstruction bound, with their unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from medpfl.core.guarantees import Guarantee, Release
from medpfl.metrics.privacy.accounting import PrivacyCurve, group_epsilon, privacy_curve
from medpfl.metrics.privacy.reconstruction_bounds import GROUP, ReconstructionBound, reconstruction_bound
from medpfl.metrics.privacy.releases import over_rounds, single_gaussian

NEIGHBORS = {
    "add_or_remove": "one {unit} more or less",
    "zero_out": "one {unit} put to zero",
    "replace": "one {unit} in place of another",
}
"""What two data sets that must look alike differ by."""


@dataclass(frozen=True)
class Statement:
    """(epsilon, delta) about one unit, composed over `rounds`. Epsilon may be infinite.

    unit: image, client, weight, or patient (with how many images). neighbors: what the two data sets that must look
    alike differ by, in words. accountant: how it was computed.
    """

    epsilon: float
    delta: float
    unit: str
    neighbors: str
    rounds: int
    accountant: str


def state(guarantee: Guarantee, *, rounds: int, delta: float, images_per_patient: int = 1) -> Statement:
    """Epsilon at `delta` over so many rounds. Raises MissingExtra where an accountant is needed that is not installed.

    With more than one image per patient a guarantee for images becomes one for patients, by group privacy; Gaussian
    releases without sampling lose only a factor in the noise multiplier. Other units are stated as they are.

    >>> guarantee = Guarantee(unit="image", neighbors="add_or_remove", releases=(Release("gaussian", 4.0),))
    >>> found = state(guarantee, rounds=10, delta=1e-5)
    >>> round(found.epsilon, 3), found.unit, found.neighbors
    (3.341, 'image', 'one image more or less')
    """
    releases = over_rounds(guarantee.releases, rounds)
    patients = guarantee.unit == "image" and images_per_patient > 1
    unit = f"patient (up to {images_per_patient} images)" if patients else guarantee.unit
    curve, size = _curve(releases, guarantee.neighbors, images_per_patient if patients else 1)
    return Statement(
        epsilon=group_epsilon(curve, size, delta),
        delta=delta,
        unit=unit,
        neighbors=NEIGHBORS[guarantee.neighbors].format(unit=unit),
        rounds=rounds,
        accountant=curve.accountant + (f", group privacy of {size}" if size > 1 else ""),
    )


def bound(
    guarantee: Guarantee, *, rounds: int, prior_success: float, images_per_patient: int = 1, weights: int = 1
) -> ReconstructionBound:
    """How often any attacker succeeds at most, who knows all but one unit and sees so many rounds.

    weights: how many numbers are sent; a guarantee for each of them says of an image what all of them together say.

    The reference that a unit is told from may be chosen freely, so the neighbor relation does not matter. Where a
    patient has several images, they count together.
    """
    releases = over_rounds(guarantee.releases, rounds)
    if guarantee.unit == "weight":
        releases = over_rounds(guarantee.releases, rounds * weights)
    if guarantee.unit != "image" or images_per_patient == 1:
        return reconstruction_bound(releases, prior_success)
    if (noise := single_gaussian(releases)) is not None:
        return reconstruction_bound([Release("gaussian", noise / images_per_patient)], prior_success)
    success, curve = prior_success, privacy_curve(releases)
    for _ in range(images_per_patient):  # the bound of one image more, with what the others let through as its prior
        success = reconstruction_bound(releases, success, curve).success if success < 1 else 1.0
    return ReconstructionBound(success, GROUP)


def bound_curve(
    guarantee: Guarantee,
    *,
    rounds: int,
    priors: Sequence[float],
    images_per_patient: int = 1,
    weights: int = 1,
) -> dict[float, float]:
    """The same bound for several priors: what an attacker may reach whose blind guess is better than one thinks.

    >>> guarantee = Guarantee(unit="image", neighbors="add_or_remove", releases=(Release("gaussian", 1.0),))
    >>> {prior: round(most, 2) for prior, most in bound_curve(guarantee, rounds=1, priors=(0.01, 0.1, 0.5)).items()}
    {0.01: 0.09, 0.1: 0.39, 0.5: 0.84}
    """
    return {
        prior: bound(
            guarantee,
            rounds=rounds,
            prior_success=prior,
            images_per_patient=images_per_patient,
            weights=weights,
        ).success
        for prior in priors
    }


def _curve(releases: Sequence[Release], neighbors: str, images: int) -> tuple[PrivacyCurve, int]:
    """The curve, and for how many units at once it must be read."""
    if (noise := single_gaussian(releases)) is not None and noise > 0:
        return privacy_curve([Release("gaussian", noise / images)]), 1
    sampled = any(release.sampling_rate < 1 for release in releases)
    if neighbors != "replace" or not sampled:
        return privacy_curve(releases), images
    # one replaced record is one removed and one added, each with half of the sensitivity
    halves = [release if release.kind == "randomized_response" else replace(release, scale=2 * release.scale)
              for release in releases]  # fmt: skip
    return privacy_curve(halves), 2 * images

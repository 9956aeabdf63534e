"""Reconstruction robustness: how often any attacker can succeed who knows everything but one unit.

`prior_success` (kappa) is how often the best blind guess succeeds, before anything is released. A bound says that no
attacker succeeds more often than that after the releases, whatever it knows of the other units and whichever attack
it runs, as long as its prior knowledge of the unit is worth no more than `prior_success`.

Balle, Cherubin, Hayes: Reconstructing Training Data with Informed Adversaries, S&P 2022 (arXiv 2201.04845): from
epsilon and from Renyi divergences. Hayes, Mahloujifar, Balle: Bounding Training Data Reconstruction in DP-SGD, NeurIPS
2023 (arXiv 2302.07225): the tight bound is the best power at false-positive rate kappa. Kaissis et al. (arXiv
2307.03928): the same as one minus a trade-off function, hence closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import ndtr, ndtri

from medpfl.core.guarantees import Release
from medpfl.metrics.privacy.accounting import PrivacyCurve, privacy_curve
from medpfl.metrics.privacy.releases import merged, single_gaussian


@dataclass(frozen=True)
class ReconstructionBound:
    """The most often that any attacker succeeds (0 to 1), and the theorem that says so."""

    success: float
    theorem: str


GAUSSIAN = "trade-off function of the Gaussian mechanism (Kaissis et al. 2023; Dong et al. 2022)"
LAPLACE = "trade-off function of the Laplace mechanism (Kaissis et al. 2023)"
ENVELOPE = "reconstruction robustness by the accountant's privacy curve (Hayes et al. 2023; Kaissis et al. 2023)"
LOWEST = -6.0
"""The most negative epsilon that is tried; negative ones matter where the prior succeeds more often than not."""

NO_NOISE = "none: without noise nothing bounds it"
GROUP = "group privacy along the trade-off function (Dong et al. 2022, Theorem 2.14)"
NOTHING = "nothing is released: the prior stays"


def reconstruction_bound(
    releases: Sequence[Release], prior_success: float, curve: PrivacyCurve | None = None
) -> ReconstructionBound:
    """The tightest bound that follows from these releases: a closed form where there is one, else the envelope.

    curve: the privacy curve of the same releases, if it is there already. Raises MissingExtra where an accountant is
    needed that is not installed.

    >>> round(reconstruction_bound([Release("gaussian", 1.0)], 0.01).success, 4)
    0.0924
    """
    releases = merged(releases)
    if not releases:
        return ReconstructionBound(prior_success, NOTHING)
    if any(one.scale == 0 and one.kind != "randomized_response" for one in releases):
        return ReconstructionBound(1.0, NO_NOISE)
    if (noise := single_gaussian(releases)) is not None:
        return ReconstructionBound(gaussian_bound(prior_success, noise), GAUSSIAN)
    if len(releases) == 1 and releases[0].count == 1:
        only = releases[0]
        full = gaussian_bound if only.kind == "gaussian" else laplace_bound if only.kind == "laplace" else None
        if full is not None:
            name = GAUSSIAN if only.kind == "gaussian" else LAPLACE
            subsampled = ", one subsampled release" if only.sampling_rate < 1 else ""
            success = subsampled_bound(prior_success, only.sampling_rate, full(prior_success, only.scale))
            return ReconstructionBound(success, name + subsampled)
    return ReconstructionBound(envelope_bound(prior_success, curve or privacy_curve(releases)), ENVELOPE)


def gaussian_bound(prior_success: float, noise: float) -> float:
    """Of Gaussian releases about every unit with this noise multiplier together: Phi(Phi^-1(kappa) + 1/s)."""
    return float(ndtr(ndtri(prior_success) + 1 / noise))


def laplace_bound(prior_success: float, scale: float) -> float:
    """Of one Laplace release with this scale over sensitivity.

    >>> round(laplace_bound(0.05, 1.0), 4), round(laplace_bound(0.3, 1 / 3), 4)
    (0.1359, 0.9585)
    """
    loss = 1 / scale
    if prior_success <= math.exp(-loss) / 2:
        return prior_success * math.exp(loss)
    if prior_success <= 0.5:
        return 1 - math.exp(-loss) / (4 * prior_success)
    return 1 - math.exp(-loss) * (1 - prior_success)


def subsampled_bound(prior_success: float, sampling_rate: float, full: float) -> float:
    """Of one release in which the unit takes part with probability `sampling_rate`; `full` if it always did.

    >>> round(subsampled_bound(0.01, 0.1, gaussian_bound(0.01, 1.0)), 4)
    0.0182
    """
    return sampling_rate * full + (1 - sampling_rate) * prior_success


def epsilon_bound(prior_success: float, epsilon: float, delta: float) -> float:
    """Of anything that is (epsilon, delta)-private: kappa e^epsilon + delta. Loose; holds for one direction alone."""
    return float(min(1.0, prior_success * math.exp(min(epsilon, 700.0)) + delta))


def envelope_bound(prior_success: float, curve: PrivacyCurve) -> float:
    """The least of kappa e^epsilon + delta(epsilon) over all real epsilons: tight as far as the accountant is."""

    def bound(epsilon: float) -> float:
        return epsilon_bound(prior_success, epsilon, curve.delta(epsilon))

    top = min(700.0, max(1.0, -math.log(prior_success)))  # beyond, kappa e^epsilon alone exceeds 1
    grid = np.linspace(LOWEST, top, 96)
    values = [bound(float(epsilon)) for epsilon in grid]
    best = int(np.argmin(values))
    around = (float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)]))
    refined = minimize_scalar(bound, bounds=around, method="bounded", options={"xatol": 1e-4})
    return float(min(1.0, min(values), refined.fun))

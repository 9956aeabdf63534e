"""Epsilons and reconstruction bounds against published numbers, closed forms, quadrature and the library itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate
from scipy.stats import laplace, norm

from medpfl.core.errors import MissingExtra
from medpfl.core.guarantees import Guarantee, Release
from medpfl.core.recipes import Recipe
from medpfl.defenses import DPSGD
from medpfl.metrics.privacy import accounting
from medpfl.metrics.privacy.accounting import group_epsilon, privacy_curve
from medpfl.metrics.privacy.no_prior import read_out_variance, success_without_prior
from medpfl.metrics.privacy.reconstruction_bounds import (
    envelope_bound,
    epsilon_bound,
    gaussian_bound,
    laplace_bound,
    reconstruction_bound,
    subsampled_bound,
)
from medpfl.metrics.privacy.renyi import renyi_bound, unbiased_error_bound
from medpfl.metrics.privacy.simulated_bound import simulated_bound
from medpfl.metrics.privacy.statements import bound, state

DELTA = 1e-5

VECTORS = [  # kappa, q, s, T: epsilon, tight bound, bound by Renyi divergences, kappa e^epsilon + delta
    (0.01, 1.0, 1.0, 1, 4.377, (0.0924, 0.0924), 0.126, 0.796),
    (0.01, 1.0, 4.0, 10, 3.341, (0.0623, 0.0623), 0.081, 0.283),
    (0.01, 0.1, 1.0, 100, 7.047, (0.146, 0.151), 0.234, 1.0),
    (0.1, 0.1, 1.0, 100, 7.047, (0.468, 0.471), 0.738, 1.0),
    (0.01, 0.01, 1.0, 1000, 1.828, (0.029, 0.029), 0.035, 0.062),
]


@pytest.mark.parametrize(("prior", "rate", "noise", "steps", "epsilon", "tight", "renyi", "loose"), VECTORS)
def test_published_values(
    prior: float,
    rate: float,
    noise: float,
    steps: int,
    epsilon: float,
    tight: tuple[float, float],
    renyi: float,
    loose: float,
) -> None:
    releases = [Release("gaussian", noise, rate, steps)]
    curve = privacy_curve(releases)
    found = curve.epsilon(DELTA)
    assert found == pytest.approx(epsilon, abs=6e-4)
    success = reconstruction_bound(releases, prior, curve).success
    assert tight[0] - 6e-4 <= success <= tight[1] + 6e-4
    assert envelope_bound(prior, curve) == pytest.approx(success, abs=1e-4)
    assert renyi_bound(prior, releases) == pytest.approx(renyi, rel=0.01, abs=6e-4)
    assert epsilon_bound(prior, found, DELTA) == pytest.approx(loose, abs=6e-4)
    assert success <= renyi_bound(prior, releases) + 1e-9


def test_one_release_with_laplace_noise_or_sampling() -> None:
    assert laplace_bound(0.05, 1.0) == pytest.approx(0.1359, abs=5e-5)
    assert laplace_bound(0.3, 1 / 3) == pytest.approx(0.9585, abs=5e-5)
    assert subsampled_bound(0.01, 0.1, gaussian_bound(0.01, 1.0)) == pytest.approx(0.0182, abs=5e-5)
    assert reconstruction_bound([Release("laplace", 1.0)], 0.05).success == pytest.approx(0.1359, abs=5e-5)
    assert reconstruction_bound([Release("gaussian", 1.0, 0.1)], 0.01).success == pytest.approx(0.0182, abs=5e-5)


@pytest.mark.parametrize("prior", [0.02, 0.2, 0.45, 0.8])
@pytest.mark.parametrize("loss", [0.5, 3.0])
def test_the_laplace_bound_is_the_most_powerful_test(prior: float, loss: float) -> None:
    """Thresholds on the observation are the most powerful tests, because the likelihood ratio is monotone."""
    threshold = laplace.isf(prior)
    assert laplace_bound(prior, 1 / loss) == pytest.approx(laplace.sf(threshold - loss), abs=1e-12)


@pytest.mark.parametrize(("target", "really"), [(5, 4.54), (10, 10.39), (20, 25.4), (50, 96.4)])
def test_the_classical_formula_costs_more_than_it_says(target: float, really: float) -> None:
    noise = math.sqrt(2 * math.log(1.25 / DELTA)) / target
    assert privacy_curve([Release("gaussian", noise)]).epsilon(DELTA) == pytest.approx(really, rel=2e-3)


def test_noise_for_a_sensitivity_that_clipping_does_not_give() -> None:
    assert privacy_curve([Release("gaussian", 4.845e-5)]).epsilon(DELTA) == pytest.approx(2.13e8, rel=1e-3)
    assert privacy_curve([Release("gaussian", 4.845e-5 / 2)]).epsilon(DELTA) == pytest.approx(8.52e8, rel=1e-3)


@pytest.mark.parametrize("noise", [0.05, 0.7, 3.0, 50.0])
@pytest.mark.parametrize("epsilon", [-1.0, 0.0, 0.3, 2.0])
def test_gaussian_delta_is_the_hockey_stick_divergence(noise: float, epsilon: float) -> None:
    def density(x: float) -> float:
        return max(0.0, float(norm.pdf(x, 1, noise) - math.exp(epsilon) * norm.pdf(x, 0, noise)))

    start = 0.5 + epsilon * noise**2
    expected = integrate.quad(density, start, max(start, 1) + 12 * noise, limit=400)[0]
    assert privacy_curve([Release("gaussian", noise)]).delta(epsilon) == pytest.approx(expected, abs=1e-7)


def test_different_noise_in_every_step_and_mixed_kinds() -> None:
    accountant = accounting.dp_accounting().pld.PLDAccountant()
    library = accounting.dp_accounting()
    for noise in (1.0, 2.0, 3.0):
        accountant.compose(library.PoissonSampledDpEvent(0.2, library.GaussianDpEvent(noise)), 5)
    accountant.compose(library.LaplaceDpEvent(4.0), 2)
    releases = [Release("gaussian", noise, 0.2, 5) for noise in (1.0, 2.0, 3.0)] + [Release("laplace", 4.0, 1.0, 2)]
    assert privacy_curve(releases).epsilon(DELTA) == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-3)
    decaying = Guarantee("image", "add_or_remove", (Release("gaussian", 8.0, decay=0.5, floor=1.0),))
    exactly = (1 / 64 + 1 / 16 + 1 / 4 + 1 + 1) ** -0.5  # rounds at 8, 4, 2, 1, 1
    assert state(decaying, rounds=5, delta=DELTA).epsilon == pytest.approx(library.get_epsilon_gaussian(exactly, DELTA))


def test_dp_sgd_of_a_client_with_sampled_steps() -> None:
    """Eight images, batches of two on average: sampling rate 1/4, six steps a round, five rounds."""
    recipe = Recipe(update="delta", batch_size=2, local_steps=3, epochs=2, images=6)
    guarantee = DPSGD(noise_multiplier=1.5).guarantee(recipe, 8)
    assert guarantee is not None
    library = accounting.dp_accounting()
    accountant = library.pld.PLDAccountant()
    accountant.compose(library.PoissonSampledDpEvent(0.25, library.GaussianDpEvent(1.5)), 30)
    found = state(guarantee, rounds=5, delta=DELTA)
    assert found.epsilon == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-3)
    assert (found.unit, found.neighbors, found.rounds) == ("image", "one image more or less", 5)


def test_many_different_steps_are_bounded_from_above() -> None:
    noises = np.linspace(4, 6, 40)
    many = privacy_curve([Release("gaussian", noise, 0.5) for noise in noises]).epsilon(DELTA)
    few = privacy_curve([Release("gaussian", 4.0, 0.5, 40)]).epsilon(DELTA)
    least = privacy_curve([Release("gaussian", 6.0, 0.5, 40)]).epsilon(DELTA)
    assert least <= many <= 1.3 * few


def test_hardly_any_noise_needs_no_memory_and_no_noise_is_infinite() -> None:
    assert privacy_curve([Release("gaussian", 0.02, 0.1, 3)]).epsilon(DELTA) > 500
    assert privacy_curve([Release("laplace", 1e-4)]).epsilon(DELTA) == pytest.approx(1e4, rel=1e-2)
    assert privacy_curve([Release("gaussian", 0.0)]).epsilon(DELTA) == math.inf
    assert reconstruction_bound([Release("gaussian", 0.0)], 0.1).success == 1.0


def test_randomized_response_adds_up() -> None:
    curve = privacy_curve([Release("randomized_response", 0.5, 1.0, 20)])
    assert curve.epsilon(0.0) == pytest.approx(10.0)
    assert curve.epsilon(DELTA) < 10.0
    single = privacy_curve([Release("randomized_response", 1.0)])
    truth = math.e / (1 + math.e)
    assert single.delta(0.25) == pytest.approx(truth - math.exp(0.25) * (1 - truth))
    assert single.delta(-2.0) == pytest.approx(1 - math.exp(-2.0))
    found = privacy_curve([Release("randomized_response", 1.0, 0.5)]).epsilon(1e-9)
    assert found == pytest.approx(math.log(1 + 0.5 * (math.e - 1)), abs=1e-6)


def test_patients_with_several_images() -> None:
    full = Guarantee("image", "add_or_remove", (Release("gaussian", 8.0),))
    whole = state(full, rounds=4, delta=DELTA, images_per_patient=2)
    library = accounting.dp_accounting()
    assert whole.epsilon == pytest.approx(library.get_epsilon_gaussian(2.0, DELTA), rel=1e-9)
    assert whole.unit == "patient (up to 2 images)"
    assert whole.neighbors == "one patient (up to 2 images) more or less"
    sampled = Guarantee("image", "add_or_remove", (Release("gaussian", 4.0, 0.1, 50),))
    one, two = (state(sampled, rounds=1, delta=DELTA, images_per_patient=k).epsilon for k in (1, 2))
    assert 2 * one < two < 5 * one
    assert bound(full, rounds=4, prior_success=0.05, images_per_patient=2).success == pytest.approx(
        norm.cdf(norm.ppf(0.05) + 0.5)
    )
    success = [bound(sampled, rounds=1, prior_success=0.05, images_per_patient=k).success for k in (1, 2, 3)]
    assert 0.05 < success[0] < success[1] < success[2] < 1
    client = Guarantee("client", "zero_out", (Release("gaussian", 2.0),))
    assert state(client, rounds=1, delta=DELTA, images_per_patient=5) == state(client, rounds=1, delta=DELTA)


def test_group_privacy_is_no_better_than_for_one_unit() -> None:
    curve = privacy_curve([Release("gaussian", 10.0)])
    tight = privacy_curve([Release("gaussian", 10.0 / 3)]).epsilon(DELTA)
    assert group_epsilon(curve, 3, DELTA) >= tight
    assert group_epsilon(curve, 3, DELTA) < 2 * tight


def test_replacing_a_sampled_record_counts_twice() -> None:
    """A record in place of another moves a sum by twice the clipping norm, so at the same noise multiplier in those
    units the replaced record may cost at most what two records of half the size do."""
    added = Guarantee("image", "add_or_remove", (Release("gaussian", 2.0, 0.1, 20),))
    replaced = Guarantee("image", "replace", (Release("gaussian", 1.0, 0.1, 20),))
    alone, both = state(added, rounds=1, delta=DELTA).epsilon, state(replaced, rounds=1, delta=DELTA).epsilon
    assert 2 * alone <= both <= 4 * alone


@pytest.mark.parametrize(("rate", "steps", "prior"), [(1.0, 1, 0.01), (0.1, 20, 0.1)])
def test_the_simulated_bound_holds_the_exact_one(rate: float, steps: int, prior: float) -> None:
    releases = [Release("gaussian", 1.0, rate, steps)]
    exact = reconstruction_bound(releases, prior).success
    found = simulated_bound(releases, prior, samples=40_000, seed=3)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= exact <= found.high
    assert found.high - found.low < 0.05


def test_bounds_grow_with_the_prior_and_never_fall_below_it() -> None:
    releases = [Release("gaussian", 2.0, 0.2, 30)]
    curve = privacy_curve(releases)
    priors = np.linspace(0.002, 0.95, 12)
    found = [reconstruction_bound(releases, float(prior), curve).success for prior in priors]
    assert np.all(np.diff(found) > 0)
    assert np.all(np.array(found) >= priors)


def test_read_out_without_prior() -> None:
    squared = 28 * 28 * 0.25
    for noise, decibel in ((0.01, 17.1), (0.1, -2.9)):
        variance = read_out_variance([Release("gaussian", noise)], squared)
        assert variance is not None
        assert 10 * math.log10(1 / variance) == pytest.approx(decibel, abs=0.05)
    thousand = read_out_variance([Release("gaussian", 0.1, 1.0, 1000)], squared)
    assert thousand is not None
    assert 10 * math.log10(1 / thousand) == pytest.approx(-2.9 + 30, abs=0.05)
    draws = np.random.default_rng(0).normal(0, 0.1, (4000, 64))
    share = float(((draws**2).mean(axis=1) <= 0.011).mean())
    assert success_without_prior(0.01, 64, 0.011) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(("noise", "error"), [(1.0, 0.145), (2.0, 0.88), (4.0, 3.9)])
def test_least_error_of_unbiased_attackers(noise: float, error: float) -> None:
    assert unbiased_error_bound([Release("gaussian", noise)]) == pytest.approx(error, rel=0.01)


def test_without_the_library_closed_forms_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    assert privacy_curve([Release("gaussian", 1.0)]).epsilon(DELTA) == pytest.approx(4.377, abs=1e-3)
    with pytest.raises(MissingExtra, match=r"pip install 'medpfl\[privacy\]'"):
        privacy_curve([Release("gaussian", 1.0, 0.1)])

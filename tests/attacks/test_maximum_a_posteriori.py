"""Priors learnt from auxiliary images, and what they add to the likelihood of a known defense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medpfl.attacks.matching.layout import Layout
from medpfl.attacks.matching.learnt.denoiser import learnt_denoiser
from medpfl.attacks.matching.learnt.gaussian import FLOOR, GaussianPrior, localized, principal_components
from medpfl.attacks.matching.learnt.terms import FIRST_STEP, pull
from medpfl.attacks.matching.learnt.variations import varied
from medpfl.attacks.maximum_a_posteriori import MaximumAPosteriori
from medpfl.attacks.rehearsal import rehearsed_errors
from medpfl.core.domain import Auxiliary, Batch, Failure, GlobalModel, Knowledge, Observation, Recipe, Reconstruction
from medpfl.core.functional import psnr
from medpfl.defenses import Defense, LocalDP, Sign
from medpfl.defenses.laplace import Laplace
from medpfl.federation.client import client_step

SHAPE = (1, 12, 12)
STRENGTH = 0.01


@pytest.fixture
def images(blobs: Any) -> Tensor:
    found: Tensor = blobs(80, SHAPE, seed=1)
    return found


@pytest.fixture
def model(make_model: Any, sigmoid_lenet: Any) -> GlobalModel:
    result: GlobalModel = make_model(sigmoid_lenet(), SHAPE)
    return result


def observed(
    model: GlobalModel, image: Tensor, auxiliary: Tensor, seed: int = 0, defense: Defense = Laplace(scale=STRENGTH)
) -> Observation:
    update, _ = client_step(
        model,
        Batch(image, torch.tensor([1])),
        Recipe(),
        hooks=defense,
        generator=torch.Generator().manual_seed(seed),
    )
    owned = Auxiliary(auxiliary, torch.arange(len(auxiliary)) % 3)
    return Observation(model, update, Recipe(), "eavesdropper", Knowledge(defense=defense.mechanism(), auxiliary=owned))


def covariance(prior: GaussianPrior) -> np.ndarray[Any, Any]:
    size = int(torch.Size(prior.shape).numel())
    return prior.scaled(torch.eye(size, dtype=torch.float64), prior.variances[None], prior.rest[None]).numpy()


def test_principal_components_are_those_of_the_sample_covariance(images: Tensor) -> None:
    prior = principal_components(images, 5)
    sample = np.cov(images.double().flatten(1).numpy(), rowvar=False)
    values, vectors = np.linalg.eigh(sample)
    found = covariance(prior)
    largest = vectors[:, ::-1][:, :5]
    np.testing.assert_allclose(largest.T @ found @ largest, np.diag(values[::-1][:5]), atol=1e-10)
    others = vectors[:, ::-1][:, 5:]
    np.testing.assert_allclose(others.T @ found @ others, float(prior.rest[0]) * np.eye(others.shape[1]), atol=1e-10)
    left_out = float(prior.rest[0])
    assert left_out > values[::-1][5:].sum() / len(values)  # images that taught the components fit them too well


@pytest.mark.parametrize("channels", [1, 3])
def test_the_localized_covariance_explains_other_images_better_than_that_of_the_sample(
    channels: int, blobs: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    images, others = (
        one + 0.03 * torch.randn(one.shape, generator=generator)
        for one in (blobs(60, (channels, 8, 8), seed=1), blobs(30, (channels, 8, 8), seed=2))
    )
    learnt = images.double().flatten(1).numpy()
    apart = others.double().flatten(1).numpy() - learnt.mean(axis=0)

    def surprise(matrix: np.ndarray[Any, Any]) -> float:
        return float((apart * np.linalg.solve(matrix, apart.T).T).sum() + len(apart) * np.linalg.slogdet(matrix)[1])

    shrunk = covariance(localized(images))
    assert np.linalg.eigvalsh(shrunk).min() > 0
    assert surprise(shrunk) < surprise(np.cov(learnt, rowvar=False) + FLOOR * np.eye(learnt.shape[1]))


def test_the_pull_is_the_quadratic_form_and_its_curvature_the_inverse(images: Tensor) -> None:
    prior = principal_components(images, 4)
    centers = torch.rand(2, 144, dtype=torch.float64)
    noise = torch.tensor([0.1, 0.3], dtype=torch.float64)
    term, precondition = pull(prior, Layout((1, *SHAPE)), centers, noise, 2.0)
    points, victims = torch.rand(3, 144, dtype=torch.float64), torch.tensor([1, 0, 1])
    values, slopes = term(points, victims)
    inverse = np.linalg.inv(covariance(prior))
    for point, victim, value, slope in zip(points, victims.tolist(), values, slopes, strict=True):
        matrix = 2.0 * (inverse + np.eye(144) / float(noise[victim]) ** 2)
        apart = (point - centers[victim]).numpy()
        assert float(value) == pytest.approx(0.5 * apart @ matrix @ apart, rel=1e-8)
        np.testing.assert_allclose(slope.numpy(), matrix @ apart, rtol=1e-6, atol=1e-8)
        back = precondition(slope[None], torch.tensor([victim]))[0] / FIRST_STEP
        np.testing.assert_allclose(back.numpy(), apart, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 11, 9), (1, 6, 7, 5)])
def test_variations_keep_the_shape_and_the_range(shape: tuple[int, ...], blobs: Any) -> None:
    images = blobs(4, shape)
    changed = varied(images, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 1
    assert float((changed - images).abs().mean()) > 0.01


def test_a_learnt_denoiser_takes_noise_off_images_that_it_has_not_seen(images: Tensor, blobs: Any) -> None:
    net = learnt_denoiser(images, steps=120, width=8)
    clean = blobs(16, SHAPE, seed=9)
    for deviation, gain in ((0.1, 0.5), (0.3, 3.0)):
        noisy = clean + deviation * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        left = net(noisy, torch.full((16,), deviation))
        assert psnr(left, clean).mean() > psnr(noisy, clean).mean() + gain
    assert learnt_denoiser(images, steps=120, width=8) is net


def test_what_is_learnt_from_auxiliary_images_sees_through_noise(
    model: GlobalModel, images: Tensor, blobs: Any
) -> None:
    truths = blobs(3, SHAPE, seed=5)
    seen = [observed(model, truths[[place]], images, place) for place in range(3)]

    def quality(**settings: Any) -> float:
        attack = MaximumAPosteriori(**settings)
        found = attack.reconstruct(seen, [torch.Generator().manual_seed(place) for place in range(3)])
        assert all(isinstance(one, Reconstruction) for one in found)
        total = 0.0
        for one, truth in zip(found, truths, strict=True):
            assert isinstance(one, Reconstruction)
            assert one.gradient_evaluations <= attack.evaluations(model, 1)
            total += float(psnr(one.images, truth[None])) / 3
        return total

    nothing, whole = quality(prior="none", iterations=100), quality(prior="covariance", iterations=60)
    assert quality(prior="principal_components", iterations=60) > nothing + 2.0
    assert whole > nothing + 3.0
    assert quality(prior="denoiser", iterations=60, denoiser_steps=60, denoiser_width=8) > nothing + 2.0


def test_rehearsals_tell_the_error_without_the_truth(model: GlobalModel, images: Tensor, blobs: Any) -> None:
    truth = blobs(1, SHAPE, seed=5)
    seen = observed(model, truth, images)
    attack = MaximumAPosteriori(iterations=60)
    (found,) = attack.reconstruct([seen], [torch.Generator().manual_seed(0)])
    assert isinstance(found, Reconstruction)
    actual = float((found.images - truth).square().mean().sqrt())
    prior = localized(images).to(torch.zeros(1))
    ((expected, spent),) = rehearsed_errors([seen], 4, attack._with_lbfgs(prior))
    assert 0.3 * actual < expected < 3.0 * actual
    assert 4 <= spent <= 4 * attack.evaluations(model, 1)


def test_auxiliary_images_are_required_only_by_priors_that_learn(model: GlobalModel, images: Tensor) -> None:
    assert MaximumAPosteriori(prior="covariance").requires() == {"auxiliary"}
    assert MaximumAPosteriori(prior="total_variation").requires() == frozenset()
    seen = observed(model, images[:1], images)
    without = replace(seen, knowledge=Knowledge())
    (refused,) = MaximumAPosteriori(prior="covariance").reconstruct([without], [torch.Generator()])
    assert refused == Failure("auxiliary images were not granted")


def test_segmentation_models_are_refused(model: GlobalModel) -> None:
    task = type("Masks", (), {"name": "segmentation"})()
    reason = MaximumAPosteriori().why_not(replace(model, task=task), Recipe(), "gradient", 1)
    assert reason is not None
    assert "masks" in reason


@pytest.mark.parametrize(
    ("defense", "least"), [(LocalDP(epsilon=1e-3), 35.0), (Sign(), 0.0)], ids=["local_dp that tells nothing", "sign"]
)
def test_an_update_that_tells_little_does_not_outvote_the_prior(
    defense: Defense, least: float, model: GlobalModel, images: Tensor
) -> None:
    """Of noise alone the mean image comes back; of signs nothing that is much worse than it."""
    auxiliary, image = images[8:], images[:1]
    attack = MaximumAPosteriori(iterations=60)
    (found,) = attack.reconstruct(
        [observed(model, image, auxiliary, defense=defense)], [torch.Generator().manual_seed(0)]
    )
    assert isinstance(found, Reconstruction)
    mean = localized(auxiliary).mean.reshape(1, *SHAPE).float()
    assert float(psnr(found.images, mean)) >= least
    assert float(psnr(found.images, image)) > float(psnr(mean, image)) - 1.5

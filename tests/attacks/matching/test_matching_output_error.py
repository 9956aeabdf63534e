"""What an update shows of the output error, the Gauss-Newton matrix, and searches that use both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medpfl.attacks.cpl import CPL
from medpfl.attacks.dlg import DLG
from medpfl.attacks.matching.curvature import LARGEST, gauss_newton
from medpfl.attacks.matching.output_error import output_error, typical_error, with_known_error
from medpfl.attacks.matching.problem import build_problem
from medpfl.core.domain import GlobalModel, Observation, Reconstruction
from medpfl.core.session import NO_SESSION, State

Observe = Callable[..., Observation]


@pytest.fixture
def model(make_model: Any, sigmoid_lenet: Any) -> GlobalModel:
    small: GlobalModel = make_model(sigmoid_lenet(size=8, width=4), (1, 8, 8), double=True)
    return small


def noisy(observation: Observation, scale: float) -> Observation:
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: tensor + scale * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for name, tensor in observation.update.trainable.items()
    }
    return replace(observation, update=replace(observation.update, trainable=tensors))


def run(attack: CPL | DLG, observations: list[Observation], seeds: list[int], session: Any = NO_SESSION) -> list[Any]:
    return attack.reconstruct(observations, [torch.Generator().manual_seed(seed) for seed in seeds], session)


def test_the_error_is_softmax_minus_label(model: GlobalModel, observe: Observe, blobs: Any) -> None:
    image = blobs(1, (1, 8, 8))
    error = output_error(observe(model, image, torch.tensor([1])))
    output, _ = model.forward(image.double())
    assert error is not None
    torch.testing.assert_close(error, output.softmax(dim=1)[0] - torch.tensor([0.0, 1.0, 0.0]))


def test_where_the_error_does_not_show(model: GlobalModel, make_model: Any, observe: Observe, blobs: Any) -> None:
    images = blobs(2, (1, 8, 8))
    one = observe(model, images[:1], torch.tensor([0]))
    assert output_error(noisy(one, 0.01)) is None
    assert output_error(observe(model, images, torch.tensor([0, 1]))) is None
    without_bias = make_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 3, bias=False)), (1, 8, 8))
    assert output_error(observe(without_bias, images[:1], torch.tensor([0]))) is None
    scaled = make_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Softsign()), (1, 8, 8))
    assert output_error(observe(scaled, images[:1], torch.tensor([0]))) is None


def test_typical_errors_keep_signs_and_norms() -> None:
    errors = torch.tensor([[-0.9, 0.7, 0.2], [-0.1, 0.01, 0.09]], dtype=torch.float64)
    typical = typical_error(errors)
    assert torch.equal(typical.sign(), errors.sign())
    torch.testing.assert_close(typical.norm(dim=1), errors.norm(dim=1))
    torch.testing.assert_close(typical[0] / typical[0].norm(), typical[1] / typical[1].norm())


def test_the_preconditioner_inverts_the_gauss_newton_matrix(model: GlobalModel, observe: Observe, blobs: Any) -> None:
    images = blobs(2, (1, 8, 8))
    problem = build_problem([observe(model, images[row : row + 1], torch.tensor([row])) for row in range(2)], "float64")
    errors = torch.tensor([[-0.8, 0.4, 0.4], [0.1, -0.2, 0.1]], dtype=torch.float64)
    weights = torch.rand(len(problem.names), generator=torch.Generator().manual_seed(0)).double().expand(2, -1)
    damping = 0.1
    curvature = gauss_newton(with_known_error(problem), errors, weights, damping)
    assert curvature is not None
    assert curvature.evaluations == (64, 64)  # two patterns of signs, each with a matrix of its own

    def residual(image: Tensor, error: Tensor) -> Tensor:
        parameters = {name: tensor.clone().requires_grad_() for name, tensor in model.parameters.items()}
        output = torch.func.functional_call(model.module, parameters, (image.reshape(1, 1, 8, 8),))
        gradients = torch.autograd.grad((output[0] * error).sum(), list(parameters.values()), create_graph=True)
        return torch.cat([weight.sqrt() * one.flatten() for weight, one in zip(weights[0], gradients, strict=True)])

    for victim in range(2):
        grey = torch.full((64,), 0.5, dtype=torch.float64)
        columns = [
            (residual(grey + 1e-5 * axis, errors[victim]) - residual(grey - 1e-5 * axis, errors[victim])) / 2e-5
            for axis in torch.eye(64, dtype=torch.float64)
        ]
        jacobian = torch.stack(columns, dim=1).detach()
        matrix = 2.0 * jacobian.T @ jacobian
        matrix = matrix + damping * matrix.diagonal().mean() * torch.eye(64, dtype=torch.float64)
        vector = torch.randn(1, 64, generator=torch.Generator().manual_seed(victim), dtype=torch.float64)
        found = curvature.precondition(vector @ matrix, torch.tensor([victim]))
        torch.testing.assert_close(found, vector, rtol=1e-3, atol=1e-3)


def test_large_images_have_no_matrix(make_model: Any, observe: Observe) -> None:
    side = int(LARGEST**0.5) + 1
    large = make_model(nn.Sequential(nn.Flatten(), nn.Linear(side * side, 3)), (1, side, side))
    problem = build_problem([observe(large, torch.rand(1, 1, side, side), torch.tensor([0]))], "float64")
    errors = torch.tensor([[-0.8, 0.4, 0.4]], dtype=torch.float64)
    ones = torch.ones(1, len(problem.names), dtype=torch.float64)
    assert gauss_newton(with_known_error(problem), errors, ones, 0.1) is None


def test_victims_that_share_a_matrix_share_its_cost(model: GlobalModel, observe: Observe, blobs: Any) -> None:
    seen = observe(model, blobs(1, (1, 8, 8)), torch.tensor([0]))
    problem = build_problem([seen] * 3, "float64")
    errors = torch.tensor([[-0.8, 0.4, 0.4], [0.1, -0.2, 0.1], [-0.2, 0.1, 0.1]], dtype=torch.float64)
    ones = torch.ones(3, len(problem.names), dtype=torch.float64)
    curvature = gauss_newton(with_known_error(problem), errors, ones, 0.1)
    assert curvature is not None
    assert curvature.evaluations == (32, 64, 32)


def test_an_image_that_the_model_is_sure_of_comes_back(
    make_model: Any, sigmoid_lenet: Any, observe: Observe, blobs: Any
) -> None:
    """Candidates' own errors vanish almost everywhere, the observed one is small but exact."""
    module = sigmoid_lenet(size=8)
    sure = make_model(module, (1, 8, 8), double=True)
    raised = sure.parameters["5.bias"] + torch.tensor([12.0, 0.0, 0.0], dtype=torch.float64)
    sure = replace(sure, parameters={**sure.parameters, "5.bias": raised})
    image = blobs(1, (1, 8, 8))
    observation = observe(sure, image, torch.tensor([0]))
    for attack in (CPL(iterations=30), DLG(iterations=30)):
        (result,) = run(attack, [observation], [0])
        assert isinstance(result, Reconstruction)
        assert result.labels is not None
        assert result.labels.tolist() == [0]
        assert float((result.images - image).abs().max()) < 0.01


class Stopping:
    """Keeps the snapshot of one checkpoint and stops there; never stops at 0."""

    def __init__(self, at: int, saved: State | None = None) -> None:
        self.at, self.saved, self.calls = at, saved, 0

    def restore(self) -> State | None:
        return self.saved

    def checkpoint(self, done: int, total: int, state: Callable[[], State]) -> None:
        assert 0 <= done <= total
        self.calls += 1
        if self.calls == self.at:
            self.saved = state()
            raise InterruptedError


@pytest.mark.parametrize("attack", [CPL(iterations=1, tolerance=0.0), DLG(iterations=1, tolerance=0.0)])
def test_victims_with_and_without_known_error_do_not_mix(
    attack: CPL | DLG, model: GlobalModel, observe: Observe, blobs: Any
) -> None:
    images = blobs(3, (1, 8, 8))
    observations = [observe(model, images[row : row + 1], torch.tensor([row])) for row in range(3)]
    observations[1] = noisy(observations[1], 0.01)
    together = run(attack, observations, [0, 1, 2])
    for row in range(3):
        (alone,) = run(attack, [observations[row]], [row])
        torch.testing.assert_close(together[row].images, alone.images, rtol=0, atol=1e-3)
        known = any("output error" in note for note in together[row].notes)
        assert known == (row != 1)
    counting = Stopping(0)
    run(attack, observations, [0, 1, 2], counting)
    for at in (1, counting.calls):
        stopping = Stopping(at)
        with pytest.raises(InterruptedError):
            run(attack, observations, [0, 1, 2], stopping)
        resumed = run(attack, observations, [7, 8, 9], Stopping(0, stopping.saved))
        for one, other in zip(together, resumed, strict=True):
            assert torch.equal(one.images, other.images)
            assert (one.objective, one.trace, one.gradient_evaluations) == (
                other.objective,
                other.trace,
                other.gradient_evaluations,
            )

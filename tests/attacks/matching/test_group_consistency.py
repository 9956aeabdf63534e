"""Coupled restarts: the group term, the consensus, and what the engine keeps of ended candidates."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from medpfl.attacks.matching.adam import Adam, noise_of
from medpfl.attacks.matching.coupling import GroupConsistency
from medpfl.attacks.matching.engine import Found, search
from medpfl.attacks.matching.layout import Layout
from medpfl.core.session import NO_SESSION, Session, State

LAYOUT = Layout((3, 1, 12, 12), (2,))
VICTIMS = torch.tensor([0, 0, 0, 1, 1])
EVERYONE = torch.ones(5, dtype=torch.bool)


def group(register: bool = True, labels: Tensor | None = None, weight: float = 0.5, every: int = 1) -> GroupConsistency:
    return GroupConsistency(LAYOUT, weight, every, register, labels)


def zero(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(variables), dtype=variables.dtype), torch.zeros_like(variables)


def candidates(blobs: Any, noise: float = 0.0) -> Tensor:
    """Victims' images as equal restarts, with noise of their own; label logits behind them."""
    images = blobs(6, (1, 12, 12)).double().reshape(2, -1)
    generator = torch.Generator().manual_seed(3)
    flat = images[VICTIMS]
    flat = flat + noise * torch.randn(flat.shape, generator=generator, dtype=torch.float64)
    return torch.cat([flat, torch.rand(5, 6, generator=generator, dtype=torch.float64)], dim=1)


@pytest.mark.parametrize("register", [True, False])
def test_equal_restarts_are_not_pulled(register: bool, blobs: Any) -> None:
    variables = candidates(blobs)
    targets = group(register).targets(variables, torch.zeros(5), VICTIMS, EVERYONE)
    values, derivatives = group(register).pull(zero, targets)(variables, VICTIMS)
    torch.testing.assert_close(values, torch.zeros_like(values), atol=1e-20, rtol=0)
    assert float(derivatives.abs().max()) < 1e-12


@pytest.mark.parametrize("register", [True, False])
def test_restarts_with_their_images_in_another_order_are_not_pulled(register: bool, blobs: Any) -> None:
    variables = candidates(blobs)
    images = variables[1, : LAYOUT.pixels].reshape(3, -1)
    variables[1, : LAYOUT.pixels] = images[[2, 0, 1]].reshape(-1)
    targets = group(register).targets(variables, torch.zeros(5), VICTIMS, EVERYONE)
    torch.testing.assert_close(targets, variables[:, : LAYOUT.pixels], atol=1e-12, rtol=0)


def test_labels_that_are_fixed_fix_the_order(blobs: Any) -> None:
    variables = candidates(blobs)
    images = variables[1, : LAYOUT.pixels].reshape(3, -1).clone()
    variables[1, : LAYOUT.pixels] = images[[2, 1, 0]].reshape(-1)
    distinct = torch.tensor([[0, 1, 2], [0, 1, 2]])
    targets = group(False, distinct).targets(variables, torch.zeros(5), VICTIMS, EVERYONE)
    torch.testing.assert_close(targets[0], variables[:3, : LAYOUT.pixels].mean(dim=0), atol=1e-12, rtol=0)
    repeated = torch.tensor([[0, 1, 0], [0, 1, 1]])
    targets = group(False, repeated).targets(variables, torch.zeros(5), VICTIMS, EVERYONE)
    torch.testing.assert_close(targets, variables[:, : LAYOUT.pixels], atol=1e-12, rtol=0)


def test_the_term_is_the_mean_square_and_its_derivative(blobs: Any) -> None:
    variables = candidates(blobs, noise=0.1)
    coupling = group(False)
    targets = coupling.targets(variables, torch.zeros(5), VICTIMS, EVERYONE)
    means = [variables[victim == VICTIMS, : LAYOUT.pixels].mean(dim=0) for victim in VICTIMS.tolist()]
    torch.testing.assert_close(targets, torch.stack(means), atol=1e-12, rtol=0)
    point = variables.clone().requires_grad_()
    expected = 0.5 * ((point[:, : LAYOUT.pixels] - targets) ** 2).mean(dim=1)
    (slope,) = torch.autograd.grad(expected.sum(), point)
    values, derivatives = coupling.pull(zero, targets)(variables, VICTIMS)
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(derivatives, slope)


def test_a_shifted_restart_is_registered_before_it_is_averaged(blobs: Any) -> None:
    variables = candidates(blobs)[:3]
    images = variables[:, : LAYOUT.pixels].reshape(3, *LAYOUT.images)
    images[1] = images[1].roll(2, dims=-1)
    victims, everyone = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)
    errors = []
    for register in (True, False):
        targets = group(register).targets(variables, torch.zeros(3), victims, everyone)
        errors.append(float((targets[0] - images[0].flatten()).square().mean()))
    assert errors[0] < 0.6 * errors[1]


def test_who_does_not_vote_is_not_pulled_and_pulls_nobody(blobs: Any) -> None:
    variables = candidates(blobs, noise=0.1)
    variables[0] = torch.nan
    voting = torch.tensor([False, True, True, True, True])
    targets = group(False).targets(variables, torch.zeros(5), VICTIMS, voting)
    torch.testing.assert_close(targets[1], variables[1:3, : LAYOUT.pixels].mean(dim=0), atol=1e-12, rtol=0)


def bowls(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
    """Two valleys per entry, at 0.2 and 0.8, so that restarts end in different places unless they are coupled."""
    low, high = variables - 0.2, variables - 0.8
    return (low * high).square().sum(dim=1), 2 * low * high * (low + high)


def run(
    weight: float, session: Session = NO_SESSION, noise: float = 0.0, seed: int = 0, patience: int = 0
) -> list[Found]:
    """Three restarts of two victims."""
    layout = Layout((2, 1, 4, 4))
    generators = [torch.Generator().manual_seed(seed + one) for one in range(2)]
    solver = Adam(
        layout=layout,
        iterations=60,
        learning_rate=0.02,
        scale=(1.0,),
        signed=False,
        schedule="cosine",
        warm_up=5,
        noise=noise,
        source=noise_of(generators),
        patience=patience,
        block=7,
    )
    starts: Callable[[], Tensor] = lambda: torch.stack(  # noqa: E731
        [torch.rand(3, layout.size, generator=one, dtype=torch.float64) for one in generators]
    )
    return search(
        bowls,
        solver,
        starts,
        torch.full((2,), -1.0, dtype=torch.float64),
        restarts=3,
        coupling=GroupConsistency(layout, weight, 20, True, torch.tensor([[0, 1], [0, 1]])) if weight else None,
        generators=generators,
        session=session,
    )


class Recording:
    """Keeps every snapshot, or starts from one."""

    def __init__(self, start: bytes | None = None) -> None:
        self.start = start
        self.snapshots: list[bytes] = []

    def restore(self) -> State | None:
        if self.start is None:
            return None
        state: State = torch.load(io.BytesIO(self.start), weights_only=True)
        return state

    def checkpoint(self, done: int, total: int, state: Callable[[], State]) -> None:
        buffer = io.BytesIO()
        torch.save(state(), buffer)
        self.snapshots.append(buffer.getvalue())


@pytest.mark.parametrize("patience", [0, 12])
def test_coupled_and_noisy_searches_resume_to_the_bit(patience: int) -> None:
    whole = Recording()
    expected = run(50.0, whole, noise=0.3, patience=patience)
    assert len(whole.snapshots) > 4
    for snapshot in whole.snapshots[:-1]:
        for one, other in zip(
            run(50.0, Recording(snapshot), noise=0.3, seed=70, patience=patience), expected, strict=True
        ):
            assert torch.equal(one.variables, other.variables)
            assert (one.objective, one.trace, one.evaluations) == (other.objective, other.trace, other.evaluations)


def test_coupled_restarts_agree_more_than_independent_ones() -> None:
    def spread(weight: float) -> float:
        recording = Recording()
        run(weight, recording)
        state = torch.load(io.BytesIO(recording.snapshots[-2]), weights_only=True)
        return float(state["ended"]["point"].reshape(2, 3, -1).std(dim=1).mean())

    assert spread(100.0) < 0.5 * spread(0.0)


def test_a_victim_does_not_feel_the_restarts_of_another() -> None:
    layout = Layout((2, 1, 4, 4))
    generator = torch.Generator().manual_seed(0)
    variables = torch.rand(6, layout.size, generator=generator, dtype=torch.float64)
    victims = torch.tensor([0, 0, 0, 1, 1, 1])
    coupling = GroupConsistency(layout, 1.0, 1, True, None)
    together = coupling.targets(variables, torch.arange(6.0), victims, torch.ones(6, dtype=torch.bool))
    alone = coupling.targets(variables[3:], torch.arange(3.0), victims[3:], torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(together[3:], alone, atol=1e-12, rtol=0)


def test_restarts_that_wait_for_each_other_cannot_be_coupled() -> None:
    layout = Layout((1, 1, 2, 2))
    solver = Adam(layout=layout, iterations=2, learning_rate=0.1, scale=(1.0,))
    with pytest.raises(ValueError, match="side by side"):
        search(
            bowls,
            solver,
            lambda: torch.zeros(1, 2, 4),
            torch.zeros(1),
            restarts=2,
            retry_above=torch.zeros(1),
            coupling=GroupConsistency(layout, 1.0, 1, False, None),
            generators=[torch.Generator()],
            session=NO_SESSION,
        )

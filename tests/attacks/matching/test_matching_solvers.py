"""L-BFGS and Adam against SciPy and torch.optim, and what batching must not change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, rosen, rosen_der
from torch import Tensor

from medpfl.attacks.matching.adam import MILESTONES, Adam, noise_of
from medpfl.attacks.matching.gradients import BatchedObjective, Layout
from medpfl.attacks.matching.lbfgs import LBFGS, LineSearch
from medpfl.attacks.matching.states import (
    DIVERGED,
    RUNNING,
    SOLVED,
    SPENT,
    STALLED,
    Solver,
    SolverState,
    running,
    select,
)


def rosenbrock(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
    values = [rosen(one.numpy()) for one in variables]
    derivatives = [rosen_der(one.numpy()) for one in variables]
    return torch.tensor(np.array(values)), torch.from_numpy(np.array(derivatives)).reshape(variables.shape)


def quadratics(count: int, size: int, seed: int = 0) -> tuple[BatchedObjective, Tensor]:
    """x'Ax/2 - b'x with another well-conditioned A and b per victim, and the minimizers."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    matrices = factors @ factors.transpose(1, 2) / size + torch.eye(size, dtype=torch.float64)
    offsets = torch.randn(count, size, generator=generator, dtype=torch.float64)

    def objective(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        product = torch.einsum("aij,aj->ai", matrices[victims], variables)
        value = (0.5 * product * variables - offsets[victims] * variables).sum(dim=1)
        return value, product - offsets[victims]

    return objective, torch.linalg.solve(matrices, offsets)


def solve(solver: Solver, objective: BatchedObjective, starts: Tensor, goals: Tensor | None = None) -> SolverState:
    """Runs until every candidate has ended, without dropping any."""
    victims = torch.arange(len(starts))
    goals = torch.full((len(starts),), -torch.inf, dtype=starts.dtype) if goals is None else goals
    state = solver.start(objective, starts, victims, goals)
    while len(running(state)):
        state = solver.advance(objective, state)
    return state


@pytest.mark.parametrize("line_search", ["wolfe", "armijo"])
def test_quadratics_reach_their_minimizers(line_search: LineSearch) -> None:
    objective, minimizers = quadratics(5, 12)
    solver = LBFGS(iterations=200, history=12, line_search=line_search)
    state = solve(solver, objective, torch.ones(5, 12, dtype=torch.float64))
    torch.testing.assert_close(state["best_point"], minimizers, atol=1e-6, rtol=0)


@pytest.mark.parametrize("line_search", ["wolfe", "armijo"])
def test_rosenbrock_as_well_as_scipy(line_search: LineSearch) -> None:
    starts = torch.tensor([[-1.2, 1.0, -1.2, 1.0], [2.0, -3.0, 1.5, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    solver = LBFGS(iterations=400, history=10, line_search=line_search, patience=400)
    state = solve(solver, rosenbrock, starts, torch.full((3,), 1e-16, dtype=torch.float64))
    for row, start in enumerate(starts):
        reference = minimize(rosen, start.numpy(), jac=rosen_der, method="L-BFGS-B", options={"maxiter": 400})
        assert float(state["best_value"][row]) <= max(1e-14, float(reference.fun))
        assert int(state["evaluations"][row]) <= 4 * reference.nfev
        torch.testing.assert_close(state["best_point"][row], torch.ones(4, dtype=torch.float64), atol=1e-5, rtol=0)


def test_the_inverse_hessian_as_preconditioner_solves_a_quadratic_at_once() -> None:
    objective, minimizers = quadratics(3, 12)
    victims = torch.arange(3)
    at_zero = objective(torch.zeros(3, 12, dtype=torch.float64), victims)[1]
    columns = [objective(torch.eye(12, dtype=torch.float64)[[axis] * 3], victims)[1] - at_zero for axis in range(12)]
    inverses = torch.linalg.inv(torch.stack(columns, dim=1))

    def inverse(gradients: Tensor, members: Tensor) -> Tensor:
        return torch.einsum("aij,aj->ai", inverses[members], gradients)

    starts, least = torch.ones(3, 12, dtype=torch.float64), objective(minimizers, victims)[0]
    state = solve(LBFGS(iterations=50, preconditioner=inverse, block=1), objective, starts, least + 1e-12)
    assert int(state["evaluations"].max()) == 2
    torch.testing.assert_close(state["best_point"], minimizers, atol=1e-6, rtol=0)


def test_any_positive_preconditioner_leads_to_the_minimizer() -> None:
    objective, minimizers = quadratics(4, 12)
    factors = torch.logspace(-1, 1, 12, dtype=torch.float64)
    solver = LBFGS(iterations=200, history=12, preconditioner=lambda gradients, _: gradients * factors)
    state = solve(solver, objective, torch.ones(4, 12, dtype=torch.float64))
    torch.testing.assert_close(state["best_point"], minimizers, atol=1e-6, rtol=0)


@pytest.mark.parametrize("history", [3, 20])
def test_unit_steps_are_those_of_torch(history: int) -> None:
    objective, _ = quadratics(3, 10, seed=1)
    starts = torch.full((3, 10), 0.3, dtype=torch.float64)
    solver = LBFGS(iterations=8, history=history, line_search="none", block=1)
    state = solver.start(objective, starts, torch.arange(3), torch.full((3,), -torch.inf, dtype=torch.float64))
    for _ in range(8):
        state = solver.advance(objective, state)
    for row in range(3):
        point = starts[row].clone().requires_grad_()
        reference = torch.optim.LBFGS(
            [point], lr=1, max_iter=8, max_eval=100, history_size=history, tolerance_grad=0, tolerance_change=0
        )

        def closure(row: int = row, point: Tensor = point) -> Tensor:
            value, derivative = objective(point.detach()[None], torch.tensor([row]))
            point.grad = derivative[0]
            return value[0]

        reference.step(closure)  # type: ignore[no-untyped-call]
        torch.testing.assert_close(state["point"][row], point.detach(), atol=1e-9, rtol=1e-7)


def test_candidates_do_not_feel_each_other() -> None:
    objective, _ = quadratics(4, 8, seed=2)
    starts = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    solver = LBFGS(iterations=9, history=5)
    together = solve(solver, objective, starts)
    for row in range(4):

        def alone(variables: Tensor, victims: Tensor, row: int = row) -> tuple[Tensor, Tensor]:
            return objective(variables, victims + row)

        single = solve(solver, alone, starts[row : row + 1])
        torch.testing.assert_close(single["best_point"][0], together["best_point"][row], atol=1e-9, rtol=0)
        assert int(single["evaluations"][0]) == int(together["evaluations"][row])


def test_a_candidate_that_is_never_finite_leaves_the_others_alone() -> None:
    objective, minimizers = quadratics(3, 6)

    def poisoned(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        value, derivative = objective(variables, victims)
        broken = victims == 1
        return value.masked_fill(broken, torch.nan), derivative.masked_fill(broken[:, None], torch.nan)

    state = solve(LBFGS(iterations=100), poisoned, torch.zeros(3, 6, dtype=torch.float64))
    assert int(state["status"][1]) == DIVERGED
    assert float(state["best_value"][1]) == float("inf")
    torch.testing.assert_close(state["best_point"][[0, 2]], minimizers[[0, 2]], atol=1e-6, rtol=0)


def test_line_searches_step_back_from_where_the_objective_is_not_finite() -> None:
    def barrier(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        """-log(x) + x, NaN left of zero; minimal at 1."""
        return (variables - variables.log()).sum(dim=1), 1 - 1 / variables

    state = solve(LBFGS(iterations=50), barrier, torch.tensor([[10.0], [0.01]], dtype=torch.float64))
    torch.testing.assert_close(state["best_point"], torch.ones(2, 1, dtype=torch.float64), atol=1e-5, rtol=0)


def test_unit_steps_that_diverge_keep_the_best_finite_iterate() -> None:
    def cliff(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        inside = variables.abs() < 2
        return torch.where(inside, variables.square(), torch.nan).sum(dim=1), -10 * variables

    start = torch.tensor([[0.5]], dtype=torch.float64)
    state = solve(LBFGS(iterations=50, line_search="none"), cliff, start)
    assert int(state["status"][0]) == DIVERGED
    assert torch.equal(state["best_point"], start)


def test_why_candidates_end() -> None:
    objective, minimizers = quadratics(1, 6)
    least, _ = objective(minimizers, torch.tensor([0]))
    start = torch.full((1, 6), 3.0, dtype=torch.float64)
    spent = solve(LBFGS(iterations=2), objective, start)
    assert (int(spent["status"][0]), int(spent["iterations"][0])) == (SPENT, 2)
    solved = solve(LBFGS(iterations=500), objective, start, least + 0.1)
    assert int(solved["status"][0]) == SOLVED
    assert float(solved["best_value"][0]) <= float(least) + 0.1
    stalled = solve(LBFGS(iterations=5000, patience=20), objective, start)
    assert int(stalled["status"][0]) != SPENT
    assert int(stalled["evaluations"][0]) < 500


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("boxed", [True, False])
def test_adam_is_that_of_torch(signed: bool, boxed: bool) -> None:
    objective, _ = quadratics(2, 8, seed=4)
    starts = torch.rand(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    solver = Adam(
        layout=Layout((1, 2, 2, 2)),
        iterations=40,
        learning_rate=0.1,
        scale=(0.5, 0.25),
        signed=signed,
        boxed=boxed,
        block=1,
    )
    state = solver.start(objective, starts, torch.arange(2), torch.full((2,), -torch.inf, dtype=torch.float64))
    for _ in range(40):
        state = solver.advance(objective, state)
    scale = torch.tensor([0.5] * 4 + [0.25] * 4, dtype=torch.float64)
    for row in range(2):
        units = (starts[row] / scale).clone().requires_grad_()
        optimizer = torch.optim.Adam([units], lr=0.1)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(share * 40) for share in MILESTONES], gamma=0.1)
        for _ in range(40):
            _, derivative = objective((units.detach() * scale)[None], torch.tensor([row]))
            gradient = derivative[0] * scale
            units.grad = gradient.sign() if signed else gradient / scale
            optimizer.step()
            schedule.step()
            if boxed:
                units.data = (units.data * scale).clamp(0, 1) / scale
        torch.testing.assert_close(state["point"][row], units.detach() * scale, atol=1e-9, rtol=0)


def one_step(solver: Adam, starts: Tensor, victims: Tensor) -> Tensor:
    """What one iteration adds under a slope of one everywhere."""

    def slope(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        return variables.sum(dim=1), torch.ones_like(variables)

    state = solver.start(slope, starts, victims, torch.full((len(starts),), -torch.inf, dtype=starts.dtype))
    return solver.advance(slope, state)["point"] - starts


def test_warm_up_and_cosine_are_those_of_torch() -> None:
    rates = []
    for count in range(1, 61):
        solver = Adam(
            layout=Layout((1, 1, 2, 2)), iterations=60, learning_rate=0.1, scale=(1.0,), schedule="cosine", warm_up=10
        )
        rates.append(solver._rate(count))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=9)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rising, falling], milestones=[10])
    expected = []
    for _ in range(60):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:10] == pytest.approx(expected[:10])
    assert rates[10:59] == pytest.approx(expected[11:])
    assert rates[59] == pytest.approx(0.0, abs=1e-12)


def test_noise_on_the_step_has_its_share_of_the_learning_rate_and_comes_from_the_victims_own_generator() -> None:
    def moved(noise: float, victims: list[int], seeds: tuple[int, ...]) -> Tensor:
        solver = Adam(
            layout=Layout((1, 1, 100, 100)),
            iterations=10,
            learning_rate=0.1,
            scale=(0.5,),
            boxed=False,
            schedule="constant",
            noise=noise,
            source=noise_of([torch.Generator().manual_seed(seed) for seed in seeds]),
            block=1,
        )
        starts = torch.zeros(len(victims), 10_000, dtype=torch.float64)
        return one_step(solver, starts, torch.tensor(victims))

    plain, noisy = moved(0.0, [0, 0, 1], (1, 2)), moved(0.2, [0, 0, 1], (1, 2))
    torch.testing.assert_close(plain, torch.full_like(plain, -0.05), atol=1e-6, rtol=0)
    assert (noisy - plain).std(dim=1).tolist() == pytest.approx([0.01] * 3, rel=0.03)
    assert not torch.equal(noisy[0], noisy[1])
    assert torch.equal(moved(0.2, [0], (2,))[0], noisy[2])


def test_adam_stops_when_nothing_improves_and_keeps_the_best_iterate() -> None:
    def flat(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(len(variables), dtype=variables.dtype), torch.ones_like(variables)

    start = torch.full((1, 4), 0.5, dtype=torch.float64)
    solver = Adam(layout=Layout((1, 1, 2, 2)), iterations=1000, learning_rate=0.1, scale=(1.0,), patience=30)
    state = solve(solver, flat, start)
    assert int(state["status"][0]) == STALLED
    assert int(state["evaluations"][0]) == 31
    assert torch.equal(state["best_point"], start)


def test_selecting_candidates_keeps_their_own_state() -> None:
    objective, _ = quadratics(3, 5)
    solver = LBFGS(iterations=30, history=4, block=3)
    starts = torch.ones(3, 5, dtype=torch.float64)
    state = solver.start(objective, starts, torch.arange(3), torch.full((3,), -torch.inf, dtype=torch.float64))
    state = solver.advance(objective, state)
    fewer = solver.advance(objective, select(state, torch.tensor([0, 2])))
    whole = solver.advance(objective, state)
    assert int(whole["status"][1]) == RUNNING
    torch.testing.assert_close(fewer["point"], whole["point"][[0, 2]], atol=1e-12, rtol=0)

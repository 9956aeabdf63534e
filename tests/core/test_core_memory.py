"""Peaks are those that can be counted by hand; budgets respect the machine and the control group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medpfl.attacks.matching.fitting import MARGIN, fitting
from medpfl.core import memory
from medpfl.core.memory import budget, default_budget, is_out_of_memory, machine_memory, memory_budget, peak_bytes

CPU = torch.device("cpu")


def test_peaks_count_what_lives_at_one_time_and_no_views_or_older_tensors() -> None:
    old = torch.zeros(1000, dtype=torch.float64)

    def chain() -> Tensor:
        values = old * 2
        for _ in range(5):
            values = values * 2  # the one before is freed afterwards
        return values.reshape(10, 100)[2:].T

    assert peak_bytes(chain) == 2 * 8000
    assert peak_bytes(lambda: old.add_(1.0).view(10, 100)) == 0
    kept = [torch.zeros(0)]
    assert peak_bytes(lambda: kept.extend(old + index for index in range(3))) == 3 * 8000


def test_peaks_see_what_a_derivative_holds() -> None:
    def derivative(count: int) -> None:
        values = torch.ones(count, 500, dtype=torch.float64).requires_grad_()
        first = torch.tanh(values)  # saved
        torch.autograd.grad(torch.tanh(first).sum(), values)

    assert 4 <= peak_bytes(lambda: derivative(10)) / (10 * 500 * 8) <= 7
    assert peak_bytes(lambda: derivative(20)) - peak_bytes(lambda: derivative(10)) == pytest.approx(
        peak_bytes(lambda: derivative(10)), rel=0.01
    )


def test_as_many_candidates_as_fit_after_what_they_share() -> None:
    def evaluate(count: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(1000), torch.zeros(count, 100)  # 4000 bytes shared, 400 for each

    with memory_budget(int(MARGIN * (4000 + 400 * 7.5))):
        assert fitting(evaluate, CPU, 64) == 7
        assert fitting(evaluate, CPU, 5) == 5
        assert fitting(evaluate, CPU, 64, beside=400) == 3
    with memory_budget(10):
        assert fitting(evaluate, CPU, 64) == 1


def test_budgets_are_shares_of_what_the_machine_and_its_control_group_allow(monkeypatch: Any, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("max\n")
    monkeypatch.setattr(memory, "_limit_files", lambda: [limit, tmp_path / "none"])
    whole = machine_memory()
    assert whole > 2**28
    limit.write_text(f"{2**28}\n")
    assert machine_memory() == 2**28
    assert default_budget(CPU, 4) == 2**25
    assert budget(CPU) == 2**27
    with memory_budget(77):
        assert budget(CPU) == 77
    assert budget(CPU) == 2**27


def test_lack_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(found.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("derivative for aten::something is not implemented"))

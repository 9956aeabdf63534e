"""Bytes of updates, counted by hand."""

from __future__ import annotations

import torch

from medpfl.core.domain import Update
from medpfl.core.mechanisms import (
    Composed,
    ErrorFeedback,
    GaussianNoise,
    LowRank,
    Mechanism,
    OrthogonalDirection,
    Quantized,
    RandomK,
    Shared,
    Signs,
    TopK,
    Unchanged,
)
from medpfl.federation.traffic import bytes_sent


def sparse(entries: int, written: int, sign: float = 1.0) -> torch.Tensor:
    """A vector with so many entries that are not zero."""
    tensor = torch.zeros(entries)
    tensor[:written] = sign
    return tensor


def count(mechanism: Mechanism, *tensors: torch.Tensor, buffers: int = 0) -> int:
    """Bytes of an update with these tensors and so many buffer entries and counters."""
    trainable = {str(place): tensor for place, tensor in enumerate(tensors)}
    running = {"mean": torch.zeros(buffers)} if buffers else {}
    counters = {"count": torch.zeros(buffers, dtype=torch.int64)} if buffers else {}
    return bytes_sent(Update("delta", trainable, running, counters, 1), mechanism)


def test_numbers_take_four_bytes_and_counters_eight() -> None:
    for mechanism in (Unchanged(), OrthogonalDirection(), Shared(buffers=True), GaussianNoise(0.1)):
        assert count(mechanism, torch.ones(10, 10), torch.ones(7)) == 428
    assert count(Unchanged(), torch.ones(5), buffers=3) == 20 + 12 + 24


def test_sparse_entries_have_a_list_or_a_map_of_places() -> None:
    assert count(TopK(0.01), sparse(3200, 32)) == 32 * 8
    assert count(TopK(0.5), sparse(3200, 1600)) == 1600 * 4 + 400
    assert count(ErrorFeedback(TopK(0.01)), sparse(3200, 32)) == 32 * 8
    assert count(TopK(1.0), torch.ones(3200)) == 3200 * 4  # no more than all entries take


def test_places_of_random_entries_follow_from_a_seed() -> None:
    assert count(RandomK(0.01), sparse(3200, 32)) == 8 + 32 * 4


def test_signs_take_a_bit_and_a_scale() -> None:
    signs = torch.ones(64)
    assert count(Signs(scaled=False), signs) == 8
    assert count(Signs(scaled=True), signs) == 12
    assert count(Signs(scaled=False), sparse(64, 60)) == 16


def test_levels_take_their_bits_and_blocks_a_scale() -> None:
    assert count(Quantized(127), torch.ones(100)) == 100 + 4
    assert count(Quantized(7), torch.ones(100)) == 50 + 4
    assert count(Quantized(7, block=30), torch.ones(100)) == 50 + 4 * 4


def test_factors_take_the_place_of_matrices() -> None:
    assert count(LowRank(2), torch.ones(12, 5, 5, 5), torch.ones(12)) == 4 * 2 * (12 + 125) + 48
    assert count(LowRank(8), torch.ones(12, 5, 5, 5)) == 4 * 1500


def test_parts_of_a_composition_add_up() -> None:
    assert count(Composed((TopK(0.01), Quantized(127))), sparse(3200, 32)) == 32 * 5 + 4
    assert count(Composed((TopK(0.01), GaussianNoise(1.0))), torch.ones(3200)) == 12800

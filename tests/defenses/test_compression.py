"""Compressing defenses against their definitions, computed with NumPy."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medpfl.core.domain import ClientState, GlobalModel, Recipe, Tensors, Update
from medpfl.core.mechanisms import ErrorFeedback, LowRank, TopK
from medpfl.core.tasks import SingleLabel
from medpfl.defenses import DEFENSES
from medpfl.defenses.compression import Compression
from medpfl.defenses.low_rank import LowRankFactors
from medpfl.defenses.prune import Prune
from medpfl.defenses.quantize import Quantize
from medpfl.defenses.random_k import RandomEntries
from medpfl.defenses.sign import Sign
from medpfl.defenses.top_k import TopEntries
from medpfl.models import prepare

SHAPES = {"conv.weight": (12, 5, 5, 5), "conv.bias": (12,), "fc.weight": (10, 300), "fc.bias": (10,)}

EVERY: dict[str, Compression] = {
    "prune": Prune(percentile=80),
    "prune-global": Prune(percentile=80, scope="global"),
    "top_k": TopEntries(share=0.2),
    "top_k-global": TopEntries(share=0.2, scope="global"),
    "random_k": RandomEntries(share=0.2),
    "sign": Sign(),
    "sign-bare": Sign(scale="none"),
    "quantize-8": Quantize(bits=8),
    "quantize-4-blocks": Quantize(bits=4, block=64, rounding="stochastic"),
    "qsgd": Quantize(bits=4, scale="norm", rounding="stochastic"),
    "low_rank": LowRankFactors(rank=2),
}
FEEDBACK = [name for name in EVERY if name != "sign-bare"]


@cache
def model() -> GlobalModel:
    """A net with a convolution, batch norm and a dense layer."""
    module = nn.Sequential(nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 16, 3))
    return prepare(module, name="small", image_shape=(1, 8, 8), task=SingleLabel(3))


def drawn(seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """Tensors with heavy tails and different scales, in float64."""
    source = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(source.standard_t(3, shape) * 10.0**-place)
        for place, (name, shape) in enumerate(shapes.items())
    }


def sent(defense: Compression, change: Tensors, seed: int = 0, state: ClientState | None = None) -> Any:
    """Message and state of one round with a gradient."""
    update = Update("gradient", change, {}, {}, 1)
    result, after = defense.update(update, model(), state or ClientState(), torch.Generator().manual_seed(seed))
    return result.trainable, after


def entries(tensors: Tensors) -> np.ndarray[Any, Any]:
    """All entries as one vector."""
    return np.concatenate([tensor.numpy().reshape(-1) for tensor in tensors.values()])


@pytest.mark.parametrize("name", FEEDBACK)
def test_feedback_loses_nothing_over_rounds(name: str) -> None:
    defense = type(EVERY[name])(**{**vars(EVERY[name]), "error_feedback": True})
    state, residual = ClientState(), {key: np.zeros(shape) for key, shape in SHAPES.items()}
    total = {key: np.zeros(shape) for key, shape in SHAPES.items()}
    for seed in range(4):
        change = drawn(seed)
        message, state = sent(defense, change, seed, state)
        left = {key: state.tensors[f"{type(defense).__name__}.residual/{key}"].numpy() for key in SHAPES}
        for key in SHAPES:
            np.testing.assert_allclose(
                message[key].numpy() + left[key], change[key].numpy() + residual[key], atol=1e-14
            )
            total[key] += message[key].numpy()
        residual = left
    for key in SHAPES:
        updates = sum(drawn(seed)[key].numpy() for seed in range(4))
        np.testing.assert_allclose(total[key] + residual[key], updates, atol=1e-9)
    assert isinstance(defense.mechanism(), ErrorFeedback)


@pytest.mark.parametrize("name", EVERY)
def test_without_feedback_a_round_forgets_the_last_one(name: str) -> None:
    if name == "low_rank":  # it keeps a factor, which is no part of an update
        return
    _, state = sent(EVERY[name], drawn(0))
    assert not state.tensors


@pytest.mark.parametrize("name", [name for name in EVERY if name != "sign-bare"])
def test_weights_carry_the_compressed_change(name: str) -> None:
    received, defense = model(), EVERY[name]
    step = drawn(1, {key: tuple(tensor.shape) for key, tensor in received.parameters.items()})
    new = {key: received.parameters[key].double() + step[key] for key in step}
    update = Update("weights", new, dict(received.buffers), dict(received.counters), 1)
    result, _ = defense.update(update, received, ClientState(), torch.Generator().manual_seed(3))
    expected, _ = sent(defense, step, 3)
    for key in step:
        change = result.trainable[key].numpy() - received.parameters[key].double().numpy()
        np.testing.assert_allclose(change, expected[key], atol=1e-6 * float(step[key].abs().max()))
    assert all(torch.equal(result.buffers[key], received.buffers[key]) for key in received.buffers)
    assert all(torch.equal(result.counters[key], received.counters[key]) for key in received.counters)
    assert all(not counter.is_floating_point() for counter in result.counters.values())


class TestTopEntries:
    """Sizes, values and ties."""

    @pytest.mark.parametrize("share", [0.01, 0.2, 0.999, 1.0])
    def test_keeps_the_largest_of_each_tensor(self, share: float) -> None:
        change = drawn()
        message, _ = sent(TopEntries(share=share), change)
        for key, tensor in change.items():
            flat, found = tensor.numpy().reshape(-1), message[key].numpy().reshape(-1)
            kept = np.argsort(-np.abs(flat))[: math.ceil(share * flat.size)]
            assert np.count_nonzero(found) == len(kept)
            np.testing.assert_array_equal(found[kept], flat[kept])

    def test_global_scope_compares_all_tensors(self) -> None:
        change = drawn()
        message, _ = sent(TopEntries(share=0.05, scope="global"), change)
        flat, found = entries(change), entries(message)
        kept = np.argsort(-np.abs(flat))[: math.ceil(0.05 * flat.size)]
        assert set(np.flatnonzero(found)) == set(kept)

    def test_ties_are_broken_by_the_generator(self) -> None:
        change = {"weight": torch.ones(1000)}
        first, again, other = (sent(TopEntries(share=0.1), change, seed)[0]["weight"] for seed in (0, 0, 1))
        assert int(first.count_nonzero()) == 100
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_counts_are_those_of_the_mechanism(self) -> None:
        message, _ = sent(TopEntries(share=0.03), drawn())
        assert int(message["fc.weight"].count_nonzero()) == TopK(0.03).survivors(3000) == 90


class TestPrune:
    """Percentiles as NumPy has them."""

    @pytest.mark.parametrize("wanted", [0, 20, 50, 90, 99])
    def test_threshold_is_the_percentile(self, wanted: float) -> None:
        change = drawn(4)
        message, _ = sent(Prune(percentile=wanted), change)
        for key, tensor in change.items():
            values = tensor.numpy()
            threshold = np.percentile(np.abs(values), wanted)
            np.testing.assert_array_equal(message[key].numpy(), np.where(np.abs(values) >= threshold, values, 0.0))
            survivors = Prune(percentile=wanted).compressor().survivors(values.size)  # type: ignore[attr-defined]
            assert np.count_nonzero(message[key].numpy()) == survivors

    def test_global_threshold(self) -> None:
        change = drawn(4)
        message, _ = sent(Prune(percentile=70, scope="global"), change)
        threshold = np.percentile(np.abs(entries(change)), 70)
        np.testing.assert_array_equal(entries(message) != 0, np.abs(entries(change)) >= threshold)

    def test_equal_entries_share_one_fate(self) -> None:
        message, _ = sent(Prune(percentile=90), {"weight": torch.full((50,), 2.0)})
        assert int(message["weight"].count_nonzero()) == 50


class TestRandomEntries:
    """Sizes and expectation."""

    def test_size_and_places_do_not_depend_on_the_data(self) -> None:
        first, _ = sent(RandomEntries(share=0.1), drawn(0), 5)
        second, _ = sent(RandomEntries(share=0.1), drawn(1), 5)
        for key, shape in SHAPES.items():
            assert int(first[key].count_nonzero()) == math.ceil(0.1 * math.prod(shape))
            np.testing.assert_array_equal(first[key].numpy() != 0, second[key].numpy() != 0)

    def test_is_unbiased(self) -> None:
        change = {"weight": torch.linspace(-1, 1, 41, dtype=torch.float64)}
        rounds = np.stack([sent(RandomEntries(share=0.25), change, seed)[0]["weight"].numpy() for seed in range(4000)])
        error = rounds.mean(axis=0) - change["weight"].numpy()
        assert np.abs(error).max() < 5 * rounds.std(axis=0).max() / math.sqrt(len(rounds))

    def test_with_feedback_entries_are_sent_as_they_are(self) -> None:
        change = drawn()
        message, _ = sent(RandomEntries(share=0.5, error_feedback=True), change)
        values = message["fc.weight"]
        assert torch.equal(values[values != 0], change["fc.weight"][values != 0])


class TestSign:
    """Three values."""

    def test_values(self) -> None:
        change = {"weight": torch.tensor([[-3.0, 0.0], [1.0, 4.0]])}
        bare, _ = sent(Sign(scale="none"), change)
        scaled, _ = sent(Sign(), change)
        assert bare["weight"].tolist() == [[-1.0, 0.0], [1.0, 1.0]]
        assert scaled["weight"].tolist() == [[-2.0, 0.0], [2.0, 2.0]]

    def test_bare_signs_of_a_change_are_refused(self) -> None:
        (reason,) = Sign(scale="none").refusals(model(), Recipe(update="delta"))
        assert "use scale: mean" in reason
        assert not Sign(scale="none").refusals(model(), Recipe())
        assert not Sign().refusals(model(), Recipe(update="weights"))


class TestQuantize:
    """Grid, error and expectation."""

    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("block", [None, 7, 64])
    def test_error_is_at_most_half_a_step(self, bits: int, block: int | None) -> None:
        change, levels = drawn(2), 2 ** (bits - 1) - 1
        message, _ = sent(Quantize(bits=bits, block=block), change)
        for key, tensor in change.items():
            flat, found = tensor.numpy().reshape(-1), message[key].numpy().reshape(-1)
            size = block or flat.size
            for start in range(0, flat.size, size):
                part, rounded = flat[start : start + size], found[start : start + size]
                step = np.abs(part).max() / levels
                assert np.abs(part - rounded).max() <= step / 2 * (1 + 1e-9)
                multiples = rounded / step
                np.testing.assert_allclose(multiples, np.rint(multiples), atol=1e-9)
                assert np.abs(multiples).max() <= levels + 1e-9

    @pytest.mark.parametrize("scale", ["max", "norm"])
    def test_stochastic_rounding_is_unbiased_and_off_by_less_than_a_step(self, scale: Any) -> None:
        change = {"weight": torch.linspace(-1, 1, 33, dtype=torch.float64)}
        defense = Quantize(bits=4, scale=scale, rounding="stochastic")
        rounds = np.stack([sent(defense, change, seed)[0]["weight"].numpy() for seed in range(4000)])
        values = change["weight"].numpy()
        step = (np.abs(values).max() if scale == "max" else np.linalg.norm(values)) / 7
        assert np.abs(rounds - values).max() < step
        assert np.abs(rounds.mean(axis=0) - values).max() < 5 * step / 2 / math.sqrt(len(rounds))
        if scale == "norm":  # QSGD, lemma 3.1
            variance = ((rounds - values) ** 2).sum(axis=1).mean()
            assert variance <= min(33 / 7**2, math.sqrt(33) / 7) * np.linalg.norm(values) ** 2

    @pytest.mark.parametrize("value", [0.0, -2.5])
    def test_constant_tensors_stay_as_they_are(self, value: float) -> None:
        message, _ = sent(Quantize(bits=4), {"weight": torch.full((5, 3), value, dtype=torch.float64)})
        np.testing.assert_allclose(message["weight"].numpy(), value, rtol=1e-15)


class TestLowRank:
    """Factors and warm start."""

    def test_residual_is_orthogonal_to_the_factor(self) -> None:
        change = drawn()
        message, _ = sent(LowRankFactors(rank=2), change)
        for key in ("conv.weight", "fc.weight"):
            matrix, found = (one[key].numpy().reshape(one[key].shape[0], -1) for one in (change, message))
            left = np.linalg.svd(found)[0][:, :2]
            assert np.linalg.matrix_rank(found, tol=1e-9) <= 2
            assert np.abs(left.T @ (matrix - found)).max() < 1e-12
        assert torch.equal(message["conv.bias"], change["conv.bias"])

    def test_small_matrices_are_sent_whole(self) -> None:
        change = {"weight": drawn()["fc.weight"][:, :6]}
        message, _ = sent(LowRankFactors(rank=2), change)
        assert torch.equal(message["weight"], change["weight"])
        assert not LowRank(2).applies((10, 6))
        assert LowRank(2).applies((12, 125))

    def test_warm_start_comes_closer_to_the_best_approximation(self) -> None:
        change, state, errors = drawn(), ClientState(), []
        matrix = change["conv.weight"].numpy().reshape(12, -1)
        for _ in range(15):
            message, state = sent(LowRankFactors(rank=2), change, 0, state)
            errors.append(np.linalg.norm(matrix - message["conv.weight"].numpy().reshape(12, -1)))
        best = math.sqrt((np.linalg.svd(matrix, compute_uv=False)[2:] ** 2).sum())
        assert errors[0] > errors[-1]
        assert errors[-1] == pytest.approx(best, rel=1e-2)

    def test_zero_stays_zero(self) -> None:
        message, _ = sent(LowRankFactors(rank=2), {"weight": torch.zeros(12, 125)})
        assert not message["weight"].any()


def test_impossible_settings_are_refused() -> None:
    impossible: dict[str, dict[str, Any]] = {
        "prune": {"percentile": 100},
        "top_k": {"share": 0},
        "random_k": {"share": 1.5},
        "quantize": {"bits": 1},
        "low_rank": {"rank": 0},
        "sign": {"scale": "max"},
    }
    for name, settings in impossible.items():
        with pytest.raises(ValueError, match=next(iter(settings))):
            DEFENSES[name].item(**settings)

"""Channels behind which several clients' updates arrive as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medpfl.audit.spec import parse_spec
from medpfl.core.domain import Batch, Broadcast, Recipe, Update
from medpfl.core.errors import SpecError
from medpfl.core.tasks import SingleLabel
from medpfl.federation import client_step, run_round
from medpfl.federation.channels import Channel
from medpfl.federation.secure import SecAggPlus, SecureChannel, SecureSum
from medpfl.models import build_model

EXAMPLES = (32, 64, 100)


def updates(scale: float = 1.0, examples: tuple[int, ...] = EXAMPLES, values: int = 200) -> list[Update]:
    generator = torch.Generator().manual_seed(4)
    return [
        Update(
            "weights",
            {"w": scale * torch.randn(values, generator=generator), "b": scale * torch.randn(3, generator=generator)},
            {"running_mean": torch.rand(3, generator=generator)},
            {"steps": torch.tensor(7)},
            count,
        )
        for count in examples
    ]


def weighted_mean(sent: list[Update], name: str = "w") -> Tensor:
    total = sum(update.examples for update in sent)
    found = torch.zeros_like(sent[0].trainable[name], dtype=torch.float64)
    for update in sent:
        found += update.trainable[name].double() * update.examples / total
    return found


def arrived(channel: Channel, sent: list[Update], seed: int = 0) -> Update:
    return channel.send(iter(sent), torch.Generator().manual_seed(seed))


def test_an_ideal_secure_sum_gives_the_weighted_mean_and_nothing_else() -> None:
    sent = updates()
    found = arrived(SecureSum(clients=3), sent)
    torch.testing.assert_close(found.trainable["w"], weighted_mean(sent), rtol=1e-12, atol=0)
    equal = torch.stack([update.trainable["w"].double() for update in sent]).mean(dim=0)
    torch.testing.assert_close(arrived(SecureSum(clients=3, weighting="equal"), sent).trainable["w"], equal)
    assert found.examples == sum(EXAMPLES)
    assert found.kind == "weights"
    assert found.counters["steps"].item() == 7
    assert not SecureSum().reveals_individual_updates


def test_the_mean_gradient_behind_a_secure_sum_is_the_gradient_of_all_images() -> None:
    model = build_model(
        "lenet_idlg", image_shape=(1, 16, 16), task=SingleLabel(3), generator=torch.Generator().manual_seed(0)
    )
    images, labels = torch.rand((6, 1, 16, 16), generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3
    clients = [(Batch(images[i : i + 2], labels[i : i + 2]), torch.Generator()) for i in (0, 2, 4)]
    found = run_round(
        Broadcast((model,)), clients, Recipe(batch_size=2), channel=SecureSum(clients=3), generator=torch.Generator()
    )
    expected, _ = client_step(model, Batch(images, labels), Recipe(batch_size=6))
    assert found.examples == expected.examples == 6
    for name, tensor in expected.trainable.items():
        torch.testing.assert_close(found.trainable[name].float(), tensor, rtol=1e-4, atol=1e-7)


def test_secagg_plus_rounds_to_its_step_without_bias() -> None:
    sent, channel = updates(), SecAggPlus(clients=3)
    expected = weighted_mean(sent)
    step = 16 / 2**22 * 1000 / sum(EXAMPLES)  # of the mean, in units of the parameters
    errors = torch.stack([arrived(channel, sent, seed).trainable["w"] - expected for seed in range(200)])
    assert float(errors.abs().max()) < 3.1 * step  # three clients round
    assert float(errors.abs().max()) > 1.0 * step
    assert float(errors.mean(dim=0).abs().max()) < 0.4 * step  # float32 keeps quarters of a step
    assert arrived(channel, sent).counters["steps"].item() == 7


def test_secagg_plus_clips_what_is_too_large_for_its_range() -> None:
    sent = updates(scale=0.0, examples=(100, 100))
    sent[0].trainable["w"][0] = 1e6
    found = arrived(SecAggPlus(clients=2), sent).trainable["w"]
    assert float(found[0]) == pytest.approx(0.5 * 8 * 1000 / 100, abs=1e-3)
    assert float(found[1:].abs().max()) < 1e-3


def test_secagg_plus_wraps_where_the_sum_leaves_the_modulus() -> None:
    sent = updates(scale=0.0, examples=(100, 100))
    channel = SecAggPlus(clients=2, modulus_range=2**22)  # the sum of two halves of 2^22 is 0 again
    found = arrived(channel, sent).trainable["w"]
    torch.testing.assert_close(found, torch.full_like(found, -16 * 1000 / 200), rtol=0, atol=0.01)


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Flower's functions, whose random numbers are those of our generator."""
    quantization = pytest.importorskip("flwr.common.secure_aggregation.quantization")
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Any:
        return torch.rand(shape, dtype=torch.float64, generator=generator).numpy()

    monkeypatch.setattr(np.random, "rand", rand)
    return quantization


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_secagg_plus_is_flowers_arithmetic(scale: float, flower: Any) -> None:
    """The steps of Flower 1.28's secaggplus_mod (client) and SecAggPlusWorkflow (server), masks left out."""
    arithmetic = pytest.importorskip("flwr.common.secure_aggregation.ndarrays_arithmetic")
    sent, clipping, target, modulus, most = updates(scale), 8.0, 2**22, 2**32, 1000.0
    total: list[Any] | None = None
    for update in sent:
        ratio = round(update.examples / most * target)
        arrays = [update.trainable["w"].numpy(), update.trainable["b"].numpy(), update.buffers["running_mean"].numpy()]
        arrays = arithmetic.parameters_multiply(arrays, ratio / target)
        vector = arithmetic.factor_combine(ratio, flower.quantize(arrays, clipping, target))
        vector = [one.astype(np.int64) for one in vector]
        total = vector if total is None else arithmetic.parameters_addition(total, vector)
    assert total is not None
    ratio, rest = arithmetic.factor_extract(arithmetic.parameters_mod(total, modulus))
    means = flower.dequantize(rest, clipping, target)
    expected = [(mean - (len(sent) - 1) * clipping) * (target / ratio) for mean in means]
    without_counters = [Update("weights", one.trainable, one.buffers, {}, one.examples) for one in sent]
    found = arrived(SecAggPlus(clients=3), without_counters)
    for mean, tensor in zip(expected, (*found.trainable.values(), *found.buffers.values()), strict=True):
        np.testing.assert_allclose(tensor.numpy(), mean, rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("steps", [2**31 - 1, 2**31])
def test_flower_rounds_to_32_bits(steps: int, flower: Any) -> None:
    """The upper end of the clipping is the number of steps itself, in float64 and without any chance."""
    (sent,) = flower.quantize([np.array([8.0])], 8.0, steps)
    assert (int(sent[0]) == steps) == (steps < 2**31)


def test_more_steps_than_32_bits_hold_are_refused() -> None:
    def asked(steps: int) -> None:
        spec = {
            "data": [{"name": "films", "reader": "phantom", "victims": 1}],
            "channels": [{"name": "secagg_plus", "quantization_range": steps}],
        }
        parse_spec(spec, Path())

    asked(2**31 - 1)
    with pytest.raises(SpecError, match="quantization_range"):
        asked(2**31)


@pytest.mark.parametrize("channel", [SecureSum, SecAggPlus])
def test_nobody_is_scored_but_the_victim_unless_asked(channel: type[SecureChannel]) -> None:
    assert channel().scored_clients == 1
    assert channel(clients=5, score="all").scored_clients == channel(clients=5).client_count == 5


def test_a_server_that_chooses_the_clipping_sees_smaller_changes() -> None:
    sent, agreed = updates(scale=1e-5), SecAggPlus(clients=3)
    told = agreed.told(agreed.fitted(1e-4, max(EXAMPLES)))
    expected = weighted_mean(sent)
    near, far = (float((arrived(channel, sent).trainable["w"] - expected).abs().max()) for channel in (told, agreed))
    assert near < 1e-8 < 1e-6 < far
    with pytest.raises(SpecError, match="max_weight"):
        agreed.told({"max_weight": 1.0})


def test_more_examples_than_max_weight_are_warned_of_with_what_is_clipped() -> None:
    channel = SecAggPlus(clients=2, max_weight=50)
    assert channel.warnings(50) == ()
    (warning,) = channel.warnings(200)
    assert "above 2" in warning  # 8 * 50 / 200
    sent = updates(scale=0.0, examples=(200, 200))
    sent[0].trainable["w"][:], sent[1].trainable["w"][:] = 2.5, 2.5
    assert float(arrived(channel, sent).trainable["w"].max()) == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize("channel", ["secure_sum", "secagg_plus"])
def test_a_sum_over_one_client_is_refused_in_one_sentence(channel: str) -> None:
    spec = {
        "data": [{"name": "films", "reader": "phantom", "victims": 1}],
        "channels": [{"name": channel, "clients": 1}],
    }
    with pytest.raises(SpecError, match="clients: 1 is no aggregation"):
        parse_spec(spec, Path())
